#include "state.h"
namespace fal::simt {
bool land_one_load(Block&) { return false; }
void tma_store_wait(int, bool) {}
}  // namespace fal::simt
