// Where the blocks' counts are added up once they have run (report.cpp).
#pragma once

#include "counters.h"

namespace fal::simt {
void add_results(const Counters& counters, const SiteTable& sites);
}
