// Equal tiles are stored once: found by hash, proved by comparison, numbered in lexicographic
// order.
#include <algorithm>
#include <bit>
#include <cstring>

#include "tiles.h"

namespace flashmark {
namespace {

uint64_t hash_tile(const uint32_t* words, int64_t n) {
  uint64_t lanes[4] = {0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9, 0x94d049bb133111eb,
                       0x2545f4914f6cdd1d};
  for (int64_t k = 0; k < n; k++) {
    uint64_t& lane = lanes[k & 3];
    lane = std::rotl(lane ^ words[k], 29) * 0x9e3779b97f4a7c15;
  }
  uint64_t hash = 0;
  for (const uint64_t lane : lanes) hash = (std::rotl(hash, 23) ^ lane) * 0xbf58476d1ce4e5b9;
  return hash ^ hash >> 32;
}

// Order of signed words, as a sort of int32 rows has it.
uint64_t sort_key(const uint32_t* words, int64_t n) {
  const uint64_t high = words[0] ^ 0x80000000u, low = n > 1 ? words[1] ^ 0x80000000u : 0;
  return high << 32 | low;
}

bool before(const uint32_t* a, const uint32_t* b, int64_t n) {
  const auto* x = reinterpret_cast<const int32_t*>(a);
  const auto* y = reinterpret_cast<const int32_t*>(b);
  return std::lexicographical_compare(x, x + n, y, y + n);
}

struct Found {
  std::vector<int64_t> first;   // of each distinct tile: where it was met first
  std::vector<int32_t> number;  // of each tile: which distinct one it is, or its class
};

Found find_distinct(const uint32_t* bits, const int64_t* counts, int64_t tiles, int64_t words,
                    int64_t area) {
  Found found;
  found.number.resize(tiles);
  std::vector<uint64_t> hashes(tiles);
  torch::stable::parallel_for(0, tiles, 64, [&](int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; x++) {
      if (counts[x] > 0 && counts[x] < area) hashes[x] = hash_tile(bits + x * words, words);
    }
  });
  const uint64_t buckets = std::bit_ceil(static_cast<uint64_t>(2 * tiles + 1));
  std::vector<int32_t> table(buckets, -1);
  for (int64_t x = 0; x < tiles; x++) {
    if (counts[x] == 0 || counts[x] == area) {
      found.number[x] = counts[x] == 0 ? kEmpty : kFull;
      continue;
    }
    for (uint64_t bucket = hashes[x] & (buckets - 1);; bucket = (bucket + 1) & (buckets - 1)) {
      if (table[bucket] < 0) {
        table[bucket] = static_cast<int32_t>(found.first.size());
        found.first.push_back(x);
      }
      const int64_t other = found.first[table[bucket]];
      if (hashes[other] == hashes[x] &&
          std::memcmp(bits + other * words, bits + x * words, words * 4) == 0) {
        found.number[x] = table[bucket];
        break;
      }
    }
  }
  return found;
}

std::vector<int64_t> sorted(const Found& found, const uint32_t* bits, int64_t words) {
  struct Entry {
    uint64_t key;
    int64_t number;
  };
  std::vector<Entry> entries(found.first.size());
  for (size_t k = 0; k < entries.size(); k++) {
    entries[k] = {sort_key(bits + found.first[k] * words, words), static_cast<int64_t>(k)};
  }
  std::sort(entries.begin(), entries.end(), [&](const Entry& a, const Entry& b) {
    if (a.key != b.key) return a.key < b.key;
    return before(bits + found.first[a.number] * words, bits + found.first[b.number] * words,
                  words);
  });
  std::vector<int64_t> order(entries.size());
  for (size_t k = 0; k < entries.size(); k++) order[k] = entries[k].number;
  return order;
}

}  // namespace

DistinctTiles distinct_tiles_cpu(const Tensor& packed, const Tensor& visible, int64_t area,
                                 int64_t max_tiles) {
  const Tensor bits = dense(packed), counts = dense(visible);
  const int64_t tiles = bits.size(0), words = bits.size(1) * bits.size(2);
  const auto* from = static_cast<const uint32_t*>(bits.const_data_ptr());
  const auto* count = static_cast<const int64_t*>(counts.const_data_ptr());
  Found found = find_distinct(from, count, tiles, words, area);
  const std::vector<int64_t> order = sorted(found, from, words);
  const int64_t distinct = static_cast<int64_t>(order.size());
  const int64_t rows = max_tiles < 0 ? distinct : max_tiles;
  const Tensor classes = allocate({tiles}, ScalarType::Int, packed);
  const Tensor tile_bits = allocate({rows, bits.size(1), bits.size(2)}, ScalarType::Int, packed);
  const Tensor visible_of_row = allocate({rows}, ScalarType::Long, packed);
  const Tensor number = allocate({1}, ScalarType::Long, packed);
  auto* to = static_cast<uint32_t*>(tile_bits.mutable_data_ptr());
  auto* row_count = static_cast<int64_t*>(visible_of_row.mutable_data_ptr());
  auto* tile_class = static_cast<int32_t*>(classes.mutable_data_ptr());
  *static_cast<int64_t*>(number.mutable_data_ptr()) = distinct;

  std::vector<int32_t> row_of(distinct);
  for (int64_t row = 0; row < distinct; row++) row_of[order[row]] = static_cast<int32_t>(row);
  torch::stable::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      if (row < distinct) {
        const int64_t tile = found.first[order[row]];
        std::memcpy(to + row * words, from + tile * words, words * 4);
        row_count[row] = count[tile];
      } else {
        std::memset(to + row * words, 0, words * 4);
        row_count[row] = 0;
      }
    }
  });
  for (int64_t x = 0; x < tiles; x++) {
    tile_class[x] = found.number[x] < 0 ? found.number[x] : row_of[found.number[x]];
  }
  return {classes, tile_bits, visible_of_row, number};
}

}  // namespace flashmark
