// How the kernels get threads and memory. Compiled once, for the baseline instruction set.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fal::cpu {

// Calls item(arg, i, scratch) once for each i in [0, items). Items are handed out one by one in
// ascending order from an atomic counter, so the longest should come first. `flops` is the whole
// call's arithmetic: a small call runs on the calling thread. Denormals are flushed while items
// run.
//
// scratch is at least scratch_bytes, 64-byte aligned, of arbitrary content, and belongs to the
// thread for the item's duration; it is kept from call to call and grown when needed. A thread that
// cannot get it takes no item; std::bad_alloc is thrown when that leaves no thread. Items must not
// throw.
void run_items(const ThreadPool& pool, int64_t items, double flops, size_t scratch_bytes,
               void (*item)(const void* arg, int64_t i, char* scratch), const void* arg);

// Memory that all threads of one call share. Throws std::bad_alloc.
void* allocate_shared(size_t bytes);
void free_shared(void* memory);

// Turn-taking between items: waits until *turn reaches `value`. Items are handed out in ascending
// order, so an item may wait for one with a smaller index and for no other.
void wait_for_turn(const int32_t* turn, int32_t value);
void pass_turn(int32_t* turn, int32_t value);

}  // namespace fal::cpu
