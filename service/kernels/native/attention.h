// Attention to keys and values where these lie, by the number of queries and the types of a task.
#pragma once
#include "attention_tiles.h"

namespace {
namespace attention {

template <class Activation, class Element>
inline void attend_as(const pw_attention *task, const pw_attended &item, void *memory) {
    if (task->counts[item.row] == 1) return attend_row<Activation, Element>(task, item, memory);
    TileScratch<UnitOf<Activation>> scratch(task, item.count, memory);
    attend_tiles<Activation, Element>(task, item, scratch);
}

inline void attend(const pw_attention *task, const pw_attended *item, void *memory) {
    if (task->key_scales) {
        if (task->dtype == PW_BFLOAT16) return attend_as<uint16_t, int8_t>(task, *item, memory);
        return attend_as<float, int8_t>(task, *item, memory);
    }
    if (task->dtype == PW_BFLOAT16) return attend_as<uint16_t, uint16_t>(task, *item, memory);
    return attend_as<float, float>(task, *item, memory);
}

inline size_t scratch_bytes(const pw_attention *task, int64_t queries) {
    const size_t single = RowScratch::bytes(task);
    const size_t tiles = task->dtype == PW_BFLOAT16 ? TileScratch<UnitOf<uint16_t>>::bytes(task, queries)
                                                    : TileScratch<UnitOf<float>>::bytes(task, queries);
    return single > tiles ? single : tiles;
}

}  // namespace attention
}  // namespace
