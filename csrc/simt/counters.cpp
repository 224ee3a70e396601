// Turning logged accesses into sectors and wavefronts; see counters.h.
#include "counters.h"

#include <algorithm>
#include <tuple>

namespace fal::simt {

namespace {
constexpr int kLanes = 32;
constexpr int kBanks = 32;
constexpr uint64_t kSectorBytes = 32;
constexpr int kWavefrontBytes = 128;

struct Request {  // one warp-wide instruction
  uint64_t address[kLanes];
  int bytes = 0;  // per lane
  Request() { std::fill(address, address + kLanes, kNoAddress); }
};

int sectors(const Request& request, int* ideal) {
  uint64_t touched[2 * kLanes];
  int count = 0, active = 0;
  for (uint64_t address : request.address) {
    if (address == kNoAddress) continue;
    active++;
    for (uint64_t s = address / kSectorBytes; s <= (address + request.bytes - 1) / kSectorBytes;
         s++)
      touched[count++] = s;
  }
  std::sort(touched, touched + count);
  const int units = int(std::unique(touched, touched + count) - touched);
  *ideal = std::min<int>(units, int((active * request.bytes + kSectorBytes - 1) / kSectorBytes));
  return units;
}

}  // namespace

const char* name_of(AccessKind kind) {
  constexpr const char* kNames[] = {"ld.global", "st.global",       "cp.async source", "ld.shared",
                                    "st.shared", "cp.async target", "ldmatrix",        "stmatrix"};
  return kNames[int(kind)];
}

void Counters::add(const Counters& other) {
  global_load_bytes += other.global_load_bytes;
  global_store_bytes += other.global_store_bytes;
  global_atomics += other.global_atomics;
  mma_flops += other.mma_flops;
  ex2 += other.ex2;
  collectives += other.collectives;
  barriers += other.barriers;
  switches += other.switches;
  launches += other.launches;
  for (int k = 0; k < int(AccessKind::kCount); k++) {
    units[k] += other.units[k];
    ideal[k] += other.ideal[k];
  }
}

int wavefronts(const uint64_t* address, int lanes, int bytes, int* ideal) {
  const int group = std::min(kLanes, kWavefrontBytes / std::max(bytes, 4));
  const int words = std::max(1, bytes / 4);
  int total = 0;
  *ideal = 0;
  for (int begin = 0; begin < lanes; begin += group) {
    uint64_t seen[kBanks][kLanes];
    int count[kBanks] = {};
    int worst = 0;
    for (int lane = begin; lane < std::min(lanes, begin + group); lane++) {
      if (address[lane] == kNoAddress) continue;
      for (int i = 0; i < words; i++) {
        const uint64_t word = address[lane] / 4 + i;
        const int bank = int(word % kBanks);
        uint64_t* end = seen[bank] + count[bank];
        if (std::find(seen[bank], end, word) != end) continue;  // one word: broadcast
        *end = word;
        worst = std::max(worst, ++count[bank]);
      }
    }
    total += worst;
    *ideal += worst > 0;
  }
  return total;
}

void flush_log(AccessLog& log, Counters& counters, SiteTable& sites) {
  if (log.empty()) return;
  std::stable_sort(log.begin(), log.end(), [](const LoggedAccess& a, const LoggedAccess& b) {
    return std::tie(a.pc, a.kind) < std::tie(b.pc, b.kind);
  });
  std::vector<Request> requests;
  for (size_t begin = 0, end; begin < log.size(); begin = end) {
    const Pc pc = log[begin].pc;
    const AccessKind kind = log[begin].kind;
    int visits[kLanes] = {};
    requests.clear();
    SiteCount& site = sites[{pc, kind}];
    for (end = begin; end < log.size() && log[end].pc == pc && log[end].kind == kind; end++) {
      const LoggedAccess& access = log[end];
      const size_t visit = visits[access.lane]++;
      if (visit == requests.size()) requests.emplace_back();
      Request& request = requests[visit];
      request.address[access.lane] = access.address;
      request.bytes = std::max<int>(request.bytes, access.bytes);
      site.bytes += access.bytes;
    }
    for (const Request& request : requests) {
      int ideal = 0;
      const int units = is_global(kind)
                            ? sectors(request, &ideal)
                            : wavefronts(request.address, kLanes, request.bytes, &ideal);
      site.requests++;
      site.units += units;
      site.ideal += ideal;
      counters.units[int(kind)] += units;
      counters.ideal[int(kind)] += ideal;
    }
  }
  log.clear();
}

}  // namespace fal::simt
