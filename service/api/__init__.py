"""The HTTP side: schemas, text, routes, streams and errors. Only this folder sees text."""
