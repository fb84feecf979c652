// The subjects of the program, each in a file of its name.
#pragma once

void test_attention();
void test_encode();
void test_interface();
void test_linear();
void test_sampling();
void test_threads();
