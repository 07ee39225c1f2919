// Dropout that every backend draws alike: philox4x32-10 of Salmon et al. (SC 2011), see
// flashmark.reference.
#pragma once
#include <cstdint>

#include "shared/problem.h"

namespace flashmark {

// Bits of the kept probabilities of keys 4 * quad .. 4 * quad + 3: bit c for query query0 + c.
inline void dropout_bits(const Problem& p, int64_t head, int64_t query0, int64_t quad,
                         uint64_t keep[4]) {
  constexpr int64_t WIDTH = 64;
  uint32_t c0[WIDTH], c1[WIDTH], c2[WIDTH], c3[WIDTH];
  for (int64_t c = 0; c < WIDTH; c++) {
    c0[c] = static_cast<uint32_t>(quad);
    c1[c] = static_cast<uint32_t>(query0 + c);
    c2[c] = static_cast<uint32_t>(head);
    c3[c] = 0;
  }
  uint32_t k0 = static_cast<uint32_t>(p.seed), k1 = static_cast<uint32_t>(p.seed >> 32);
  for (int round = 0; round < 10; round++) {
    for (int64_t c = 0; c < WIDTH; c++) {
      const uint64_t low = uint64_t{0xD2511F53} * c0[c], high = uint64_t{0xCD9E8D57} * c2[c];
      c0[c] = static_cast<uint32_t>(high >> 32) ^ c1[c] ^ k0;
      c1[c] = static_cast<uint32_t>(high);
      c2[c] = static_cast<uint32_t>(low >> 32) ^ c3[c] ^ k1;
      c3[c] = static_cast<uint32_t>(low);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint32_t* words[4] = {c0, c1, c2, c3};
  for (int n = 0; n < 4; n++) {
    uint64_t bits = 0;
    for (int64_t c = 0; c < WIDTH; c++) bits |= uint64_t{words[n][c] >= p.drop_below} << c;
    keep[n] = bits;
  }
}

// keep[j] for keys key0 + j, j in [0, n).
inline void dropout_rows(const Problem& p, int64_t head, int64_t query0, int64_t key0, int64_t n,
                         uint64_t* keep) {
  for (int64_t quad = key0 / 4; quad * 4 < key0 + n; quad++) {
    uint64_t four[4];
    dropout_bits(p, head, query0, quad, four);
    for (int64_t x = 0; x < 4; x++) {
      const int64_t j = quad * 4 + x - key0;
      if (j >= 0 && j < n) keep[j] = four[x];
    }
  }
}

}  // namespace flashmark
