// The CPU engine's cases are data.
#pragma once

#include <string>
#include <vector>

namespace fal::test {

enum class BiasKind { kNone, kFull, kOneHead, kOneRow, kStrided };

struct Case {
  std::string name;
  int batch = 2, heads_q = 2, heads_k = 2, head_dim = 32, head_dim_v = 32;
  int seqlen_q = 40, seqlen_k = 40;
  int left = -1, right = -1;
  double scale = 1;  // times 1 / sqrt(head_dim)
  double softcap = 0;
  int alibi = 0;  // 1: one slope per head, 2: per (batch entry, head)
  bool sinks = false;
  BiasKind bias = BiasKind::kNone;
  double dropout = 0;
  int layout = 0;
  std::vector<int> cu_q = {},
                   cu_k = {};  // varlen: lengths; one entry more than batch = rows past the end
  std::vector<int> used_q = {}, used_k = {}, leftpad = {};
  int page_size = 0;
  bool dlse = false;
  int nan_key = -1, nan_value = -1, nan_query = -1;  // that row of every sequence is NaN
};

inline std::vector<Case> all_cases() {
  std::vector<Case> cases;
  const auto add = [&](const char* name, auto edit) {
    Case c;
    c.name = name;
    edit(c);
    cases.push_back(c);
  };
  const auto lengths = [](Case& c, int q, int k) { c.seqlen_q = q, c.seqlen_k = k; };
  const auto dims = [](Case& c, int d, int dv) { c.head_dim = d, c.head_dim_v = dv; };
  const auto window = [](Case& c, int l, int r) { c.left = l, c.right = r; };

  add("plain", [](Case&) {});
  add("one_row_one_key", [&](Case& c) { lengths(c, 1, 1), dims(c, 1, 1); });
  add("one_row", [&](Case& c) { lengths(c, 1, 300), dims(c, 64, 64), c.dlse = true; });
  add("one_key", [&](Case& c) { lengths(c, 300, 1), dims(c, 7, 3); });
  add("two_tiles", [&](Case& c) { lengths(c, 193, 97), c.layout = 2, c.batch = 1; });
  add("many_tiles", [&](Case& c) { lengths(c, 450, 421), dims(c, 64, 64), c.batch = 1; });
  add("key_blocks_causal", [&](Case& c) {
    lengths(c, 500, 1000), dims(c, 16, 16), window(c, -1, 0), c.batch = 1, c.heads_q = 2,
                                                              c.heads_k = 1;
  });
  add("dim_256",
      [&](Case& c) { lengths(c, 70, 130), dims(c, 256, 256), c.heads_q = c.heads_k = 1; });
  add("dim_255_v_17", [&](Case& c) { lengths(c, 61, 103), dims(c, 255, 17), window(c, -1, 0); });
  add("dim_3_v_200", [&](Case& c) { lengths(c, 33, 65), dims(c, 3, 200), c.layout = 1; });
  add("dim_80_96", [&](Case& c) { lengths(c, 100, 100), dims(c, 80, 96), window(c, -1, 0); });
  add("dim_33_gaps",
      [&](Case& c) { lengths(c, 50, 77), dims(c, 33, 41), c.layout = 2, c.dlse = true; });
  // Around the edges of tiles of 16 and 32 rows, keys and dims, and of tiles of 256 keys.
  const int edge_q[] = {1, 15, 16, 17, 31, 33, 255, 257},
            edge_k[] = {257, 16, 15, 33, 255, 31, 1, 17};
  const int edge_dim[] = {1, 8, 31, 33, 64, 96, 128, 200};
  for (int i = 0; i < 8; ++i) {
    const std::string name = "edges_" + std::to_string(edge_q[i]) + "_" + std::to_string(edge_k[i]);
    add(name.c_str(), [&](Case& c) {
      c.batch = 1, lengths(c, edge_q[i], edge_k[i]), dims(c, edge_dim[i], edge_dim[7 - i]);
      window(c, -1, i % 2 ? 0 : -1), c.dlse = true;
    });
  }
  // The greatest score of a row keeps growing along the keys, or is far ahead of all others.
  add("steep", [&](Case& c) {
    c.alibi = 1, c.scale = 20, lengths(c, 70, 530), dims(c, 64, 64), c.batch = 1;
  });
  add("steep_causal", [&](Case& c) {
    c.scale = 40, lengths(c, 300, 300), dims(c, 48, 80), window(c, -1, 0), c.batch = 1;
  });
  add("scale_negative", [&](Case& c) { c.scale = -1, lengths(c, 60, 90), window(c, -1, 0); });
  add("scale_zero", [&](Case& c) { c.scale = 0, lengths(c, 60, 90), window(c, -1, 0); });
  add("causal", [&](Case& c) { lengths(c, 200, 200), window(c, -1, 0), c.dlse = true; });
  add("causal_more_keys", [&](Case& c) { lengths(c, 113, 271), window(c, -1, 0); });
  add("causal_more_rows", [&](Case& c) { lengths(c, 271, 113), window(c, -1, 0), c.dlse = true; });
  add("window_both", [&](Case& c) { lengths(c, 300, 300), window(c, 20, 7), c.batch = 1; });
  add("window_left", [&](Case& c) { lengths(c, 260, 210), window(c, 33, 0); });
  add("window_right", [&](Case& c) { lengths(c, 150, 210), window(c, -1, 11); });
  add("window_zero", [&](Case& c) { lengths(c, 130, 130), window(c, 0, 0); });
  add("left_only", [&](Case& c) { lengths(c, 240, 100), window(c, 5, -1), c.dlse = true; });
  add("beyond_window", [&](Case& c) { lengths(c, 20, 20), window(c, 1000, 1000); });
  add("gqa",
      [&](Case& c) { c.heads_q = 6, c.heads_k = 2, lengths(c, 210, 130), window(c, -1, 0); });
  add("mqa", [&](Case& c) { c.heads_q = 4, c.heads_k = 1, c.layout = 1, dims(c, 40, 24); });
  add("softcap", [&](Case& c) { c.softcap = 2.5, lengths(c, 101, 118), window(c, -1, 0); });
  add("softcap_large", [&](Case& c) { c.softcap = 50; });
  add("alibi", [&](Case& c) { c.alibi = 1, lengths(c, 120, 99), window(c, -1, 0); });
  add("alibi_batch", [&](Case& c) { c.alibi = 2, lengths(c, 60, 130); });
  add("sinks",
      [&](Case& c) { c.sinks = true, lengths(c, 200, 100), window(c, 30, 0), c.dlse = true; });
  add("sinks_gqa", [&](Case& c) { c.sinks = true, c.heads_q = 4, c.heads_k = 2; });
  add("bias", [&](Case& c) { c.bias = BiasKind::kFull, lengths(c, 207, 131), c.heads_q = 4; });
  add("bias_one_head", [&](Case& c) { c.bias = BiasKind::kOneHead, window(c, -1, 0); });
  add("bias_one_row", [&](Case& c) { c.bias = BiasKind::kOneRow, lengths(c, 37, 98); });
  add("bias_strided",
      [&](Case& c) { c.bias = BiasKind::kStrided, lengths(c, 98, 37), c.softcap = 4; });
  add("dropout", [&](Case& c) { c.dropout = 0.3, lengths(c, 210, 200), c.heads_q = 4; });
  add("dropout_causal", [&](Case& c) { c.dropout = 0.1, lengths(c, 90, 120), window(c, -1, 0); });
  add("everything", [&](Case& c) {
    c.softcap = 5, c.alibi = 2, c.sinks = true, c.bias = BiasKind::kFull, c.dropout = 0.25;
    c.dlse = true, c.heads_q = 4, lengths(c, 215, 301), window(c, 150, 20), dims(c, 24, 40);
  });
  add("no_keys", [&](Case& c) { lengths(c, 30, 0), c.dlse = true; });
  add("no_keys_sinks", [&](Case& c) { lengths(c, 30, 0), c.sinks = true, c.dlse = true; });
  add("no_rows", [&](Case& c) { lengths(c, 0, 30); });
  add("no_batch", [&](Case& c) { c.batch = 0; });
  add("used", [&](Case& c) {
    c.batch = 4, lengths(c, 50, 120), c.used_q = {50, 0, 13, 49}, c.used_k = {0, 120, 97, 5};
    window(c, -1, 0), c.dlse = true;
  });
  add("varlen", [&](Case& c) {
    c.batch = 5, c.cu_q = {0, 17, 200, 1, 64, 9}, c.cu_k = {5, 33, 100, 0, 201, 4},
    window(c, -1, 0);
    c.dlse = true;
  });
  add("varlen_full", [&](Case& c) {
    c.batch = 3, c.cu_q = {100, 33, 64, 0}, c.cu_k = {100, 33, 64, 0}, c.heads_q = 4, c.layout = 2;
  });
  add("varlen_used_leftpad", [&](Case& c) {
    c.batch = 3, c.cu_q = {40, 50, 3, 2}, c.cu_k = {60, 130, 30, 2}, c.used_q = {40, 21, 0};
    c.used_k = {60, 99, 30}, c.leftpad = {11, 0, 30}, window(c, -1, 0), c.sinks = true;
  });
  add("leftpad", [&](Case& c) {
    c.batch = 3, lengths(c, 60, 130), c.leftpad = {0, 99, 17}, window(c, 40, 0), c.alibi = 1;
  });
  add("varlen_everything", [&](Case& c) {
    c.batch = 3, c.cu_q = {140, 50, 3, 2}, c.cu_k = {60, 130, 30, 2}, c.sinks = true, c.dlse = true;
    c.bias = BiasKind::kFull, c.softcap = 6, c.dropout = 0.2, c.alibi = 1;
  });
  add("paged_1", [&](Case& c) { c.page_size = 1, lengths(c, 20, 101), window(c, -1, 0); });
  add("paged_5", [&](Case& c) {
    c.page_size = 5, lengths(c, 100, 211), c.used_k = {211, 43}, c.heads_q = 4, window(c, -1, 0);
  });
  add("paged_16_leftpad", [&](Case& c) {
    c.page_size = 16, lengths(c, 70, 96), c.used_k = {90, 33}, c.leftpad = {7, 33},
    window(c, 50, 0);
  });
  add("paged_64_varlen_q", [&](Case& c) {
    c.page_size = 64, c.cu_q = {30, 1}, c.seqlen_k = 300, c.used_k = {299, 300}, dims(c, 128, 128);
  });
  add("nan_key_causal", [&](Case& c) { c.nan_key = 100, lengths(c, 205, 205), window(c, -1, 0); });
  add("nan_key_window", [&](Case& c) { c.nan_key = 50, lengths(c, 205, 205), window(c, 9, 3); });
  add("nan_key_softcap", [&](Case& c) {
    c.nan_key = 100, lengths(c, 205, 205), window(c, -1, 0), c.softcap = 3,
    c.bias = BiasKind::kFull;
  });
  add("nan_value_causal",
      [&](Case& c) { c.nan_value = 101, lengths(c, 205, 205), window(c, -1, 0); });
  add("nan_value_window", [&](Case& c) { c.nan_value = 3, lengths(c, 205, 205), window(c, 2, 2); });
  add("nan_query_causal",
      [&](Case& c) { c.nan_query = 97, lengths(c, 205, 205), window(c, -1, 0); });
  return cases;
}

}  // namespace fal::test
