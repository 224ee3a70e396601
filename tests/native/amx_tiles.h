// The tile instructions of csrc/cpu/amx.h in C++ (FAL_AMX_TILES), included inside its namespace:
// what the AMX kernels compute can thus be checked on every processor with AVX-512 BF16. The
// registers hold garbage wherever hardware would fault: outside of a TileSession.

alignas(64) inline thread_local uint32_t tile_registers[8][16][16];
inline thread_local bool tiles_configured = false;

inline void require_tiles() {
  if (!tiles_configured) __builtin_trap();  // #UD
}

template <int kTile>
inline void tile_load(const void* rows, int64_t stride) {
  require_tiles();
  for (int r = 0; r < 16; ++r) {
    memcpy(tile_registers[kTile][r], static_cast<const char*>(rows) + r * stride, 64);
  }
}
template <int kTile>
inline void tile_store(void* rows, int64_t stride) {
  require_tiles();
  for (int r = 0; r < 16; ++r) {
    memcpy(static_cast<char*>(rows) + r * stride, tile_registers[kTile][r], 64);
  }
}
template <int kTile>
inline void tile_zero() {
  require_tiles();
  memset(tile_registers[kTile], 0, sizeof tile_registers[kTile]);
}

// The low and the high bf16 of a 32-bit lane; denormals count as zero.
inline float tile_element(uint32_t pair, int which) {
  uint32_t bits = which ? pair & 0xffff0000u : pair << 16;
  if (!(bits & 0x7f800000u)) bits &= 0x80000000u;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

template <int kC, int kA, int kB>
inline void tile_multiply() {
  require_tiles();
  for (int m = 0; m < 16; ++m) {
    float c[16];
    memcpy(c, tile_registers[kC][m], 64);
    for (int which = 0; which < 2; ++which) {
      for (int p = 0; p < 16; ++p) {
        const float a = tile_element(tile_registers[kA][m][p], which);
        for (int n = 0; n < 16; ++n) {
          c[n] = __builtin_fmaf(a, tile_element(tile_registers[kB][p][n], which), c[n]);
        }
      }
    }
    memcpy(tile_registers[kC][m], c, 64);
  }
}

class TileSession {
 public:
  TileSession() {
    if (tiles_configured) __builtin_trap();
    tiles_configured = true;
    memset(tile_registers, 0xff, sizeof tile_registers);  // NaN
  }
  ~TileSession() { tiles_configured = false; }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};
