// Reports and results: one report per kind and place, addresses turned into file:line by addr2line
// when somebody asks, and everything as text.
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>

#include "device_memory.h"
#include "results.h"
#include "state.h"

namespace fal::simt {

namespace {

struct Found {
  std::string kind, message;
  Pc pc;
};

std::mutex results_lock;
Config active_config;
std::vector<Found> found;
Counters totals;
SiteTable all_sites;

std::mutex names_lock;
std::map<Pc, std::string> names;

// Frames of the emulator's own headers, which every call site begins with, and of what calls a
// kernel.
bool is_wrapper_frame(const std::string& line) {
  for (const char* file : {"ptx.cuh:", "ptx_sm90.cuh:", "cuda_names.h:", "cuda_types.h:",
                           "kernel_api.h:", "launch.h:", "tuple:", "invoke.h:"})
    if (line.rfind(file, 0) == 0) return true;
  return false;
}

struct ObjectAddress {
  std::string file;
  uintptr_t address;
};

ObjectAddress locate(Pc pc) {
  const uintptr_t call = uintptr_t(pc) - 1;  // the return address points behind the call
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(call), &info) || !info.dli_fname) return {"", 0};
  const auto* header = static_cast<const ElfW(Ehdr)*>(info.dli_fbase);
  const uintptr_t base = header->e_type == ET_EXEC ? 0 : uintptr_t(info.dli_fbase);
  return {info.dli_fname, call - base};
}

// Asks addr2line about all addresses of one object file at once.
void resolve(const std::string& file, const std::vector<std::pair<Pc, uintptr_t>>& wanted) {
  std::string command = "addr2line -a -i -s -e '" + file + "'";
  char text[512];
  for (const auto& [pc, address] : wanted) {
    std::snprintf(text, sizeof text, " 0x%lx", static_cast<unsigned long>(address));
    command += text;
  }
  FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r");
  if (!pipe) return;
  size_t index = size_t(-1);
  while (std::fgets(text, sizeof text, pipe)) {
    std::string line(text);
    while (!line.empty() && (line.back() == '\n' || line.back() == ' ')) line.pop_back();
    const size_t note = line.find(" (discriminator");
    if (note != std::string::npos) line.erase(note);
    if (line.rfind("0x", 0) == 0) {
      index++;
    } else if (index < wanted.size() && !is_wrapper_frame(line)) {
      std::string& name = names[wanted[index].first];
      name += (name.empty() ? "" : " < ") + line;
    }
  }
  pclose(pipe);
}

}  // namespace

std::vector<std::string> where_all(const std::vector<Pc>& pcs) {
  std::lock_guard<std::mutex> guard(names_lock);
  std::map<std::string, std::vector<std::pair<Pc, uintptr_t>>> wanted;
  for (Pc pc : pcs) {
    if (!pc || names.count(pc)) continue;
    const ObjectAddress at = locate(pc);
    names[pc];
    if (!at.file.empty()) wanted[at.file].push_back({pc, at.address});
  }
  for (const auto& [file, list] : wanted) resolve(file, list);
  std::vector<std::string> result;
  for (Pc pc : pcs) {
    const auto known = names.find(pc);
    result.push_back(!pc || known == names.end() || known->second.empty() ? "?" : known->second);
  }
  return result;
}

std::string where(Pc pc) { return where_all({pc})[0]; }

bool same_place(Pc a, Pc b) {
  const std::vector<std::string> lines = where_all({a, b});
  return lines[0] == lines[1];
}

void report(Pc pc, const char* kind, const char* format, ...) {
  char text[4096];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  char who[128] = "";
  const Block* block = current_block;
  if (block && block->current != &block->host) {
    const Fiber& fiber = block->on_behalf_of ? *block->on_behalf_of : *block->current;
    std::snprintf(who, sizeof who, " [block (%u,%u,%u), thread %u = warp %u lane %u]", block->id.x,
                  block->id.y, block->id.z, fiber.index, fiber.warp, fiber.lane);
  }
  std::lock_guard<std::mutex> guard(results_lock);
  for (const Found& other : found)
    if (other.pc == pc && other.kind == kind) return;
  if (int(found.size()) < active_config.max_reports)
    found.push_back({kind, std::string(text) + who, pc});
}

void report_poison(uint32_t word, Pc pc, const char* what) {
  if (word == kUninitialisedWord)
    report(pc, "uninitialised-register", "%s was never set", what);
  else
    report(pc, "wgmma-accumulator-touched", "%s is an accumulator of a wgmma in flight", what);
}

// ---- results
// -------------------------------------------------------------------------------------------

void configure(const Config& config) { active_config = config; }
const Config& config() { return active_config; }

void add_results(const Counters& counters, const SiteTable& sites) {
  std::lock_guard<std::mutex> guard(results_lock);
  totals.add(counters);
  for (const auto& [place, count] : sites) {
    all_sites[place].add(count);
  }
}

std::vector<Report> reports() {
  std::vector<Pc> pcs;
  for (const Found& f : found) pcs.push_back(f.pc);
  const std::vector<std::string> places = where_all(pcs);
  std::vector<Report> result;
  for (size_t i = 0; i < found.size(); i++)
    result.push_back({found[i].kind, found[i].message, places[i]});
  return result;
}

std::map<std::string, uint64_t> counters() {
  std::map<std::string, uint64_t> c = {
      {"global_load_bytes", totals.global_load_bytes},
      {"global_store_bytes", totals.global_store_bytes},
      {"global_atomics", totals.global_atomics},
      {"mma_flops", totals.mma_flops},
      {"ex2", totals.ex2},
      {"collectives", totals.collectives},
      {"barriers", totals.barriers},
      {"switches", totals.switches},
      {"launches", totals.launches},
  };
  const auto put = [&](const char* key, std::initializer_list<AccessKind> kinds) {
    uint64_t units = 0, ideal = 0;
    for (AccessKind kind : kinds) {
      units += totals.units[int(kind)];
      ideal += totals.ideal[int(kind)];
    }
    c[key] = units;
    c[std::string(key) + "_ideal"] = ideal;
  };
  put("global_load_sectors", {AccessKind::kGlobalLoad, AccessKind::kCopySource});
  put("global_store_sectors", {AccessKind::kGlobalStore});
  put("smem_load_wavefronts", {AccessKind::kSharedLoad});
  put("smem_store_wavefronts", {AccessKind::kSharedStore});
  put("ldmatrix_wavefronts", {AccessKind::kLdmatrix});
  put("stmatrix_wavefronts", {AccessKind::kStmatrix});
  put("cp_async_smem_wavefronts", {AccessKind::kCopyTarget});
  return c;
}

std::vector<Site> sites() {
  std::vector<Pc> pcs;
  for (const auto& [place, count] : all_sites) pcs.push_back(place.first);
  const std::vector<std::string> places = where_all(pcs);
  std::map<std::pair<std::string, AccessKind>, SiteCount> by_line;  // the compiler may clone a call
  size_t i = 0;
  for (const auto& [place, count] : all_sites) {
    by_line[{places[i++], place.second}].add(count);
  }
  std::vector<Site> result;
  for (const auto& [place, count] : by_line)
    result.push_back({place.first, name_of(place.second), count.requests, count.bytes, count.units,
                      count.ideal});
  return result;
}

std::string summary() {
  std::string text;
  char line[1024];
  for (const Report& r : reports())
    text += r.kind + ": " + r.message + "\n    at " + r.where + "\n";
  if (text.empty()) text = "no reports\n";
  for (const auto& [name, t] : traffic()) {
    std::snprintf(line, sizeof line, "buffer %-16s read %12llu B, written %12llu B\n", name.c_str(),
                  static_cast<unsigned long long>(t.read_bytes),
                  static_cast<unsigned long long>(t.written_bytes));
    text += line;
  }
  for (const auto& [name, value] : counters()) {
    std::snprintf(line, sizeof line, "%-32s %14llu\n", name.c_str(),
                  static_cast<unsigned long long>(value));
    text += line;
  }
  for (const Site& s : sites()) {
    std::snprintf(
        line, sizeof line, "%-16s %8llu requests %10llu B %8llu units (ideal %8llu, x%.2f)  %s\n",
        s.kind.c_str(), static_cast<unsigned long long>(s.requests),
        static_cast<unsigned long long>(s.bytes), static_cast<unsigned long long>(s.units),
        static_cast<unsigned long long>(s.ideal), double(s.units) / double(s.ideal ? s.ideal : 1),
        s.where.c_str());
    text += line;
  }
  return text;
}

void clear_results() {
  std::lock_guard<std::mutex> guard(results_lock);
  found.clear();
  totals = Counters();
  all_sites.clear();
  clear_traffic();
}

void reset() {
  free_buffers();
  clear_results();
}

}  // namespace fal::simt
