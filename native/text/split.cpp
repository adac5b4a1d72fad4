#include "text/split.h"

#include <array>
#include <cstring>
#include <vector>

namespace limbeck::text {
namespace {

constexpr uint32_t kRanges[] = {
#include "text/unicode_ranges.h"
};
constexpr uint32_t kCodePoints = 0x110000;

// Two-stage table: pages of 256 code points, equal pages stored once.
struct ClassTable {
  std::array<uint8_t, kCodePoints / 256> page{};
  std::vector<std::array<CharClass, 256>> pages;

  ClassTable() {
    std::vector<CharClass> flat(kCodePoints, CharClass::other);
    const size_t n = sizeof(kRanges) / sizeof(kRanges[0]);
    for (size_t i = 0; i < n; ++i) {
      const uint32_t stop = i + 1 < n ? kRanges[i + 1] >> 4 : kCodePoints;
      for (uint32_t c = kRanges[i] >> 4; c < stop; ++c) flat[c] = static_cast<CharClass>(kRanges[i] & 15);
    }
    for (uint32_t p = 0; p < page.size(); ++p) {
      const CharClass* from = &flat[p * 256];
      size_t q = 0;
      while (q < pages.size() && std::memcmp(pages[q].data(), from, 256) != 0) ++q;
      if (q == pages.size()) std::memcpy(pages.emplace_back().data(), from, 256);
      page[p] = static_cast<uint8_t>(q);
    }
  }
  CharClass of(uint32_t c) const { return pages[page[c >> 8]][c & 255]; }
};

const ClassTable& table() {
  static const ClassTable t;
  return t;
}

constexpr std::array<CharClass, 128> kAscii = [] {
  std::array<CharClass, 128> t{};
  for (int c = 'a'; c <= 'z'; ++c) t[c] = t[c - 32] = CharClass::letter;
  for (int c = '0'; c <= '9'; ++c) t[c] = CharClass::number;
  for (int c : {9, 10, 11, 12, 13, 32}) t[c] = CharClass::space;
  return t;
}();

Char wide_char_at(const uint8_t* p, const uint8_t* end) {
  const CodePoint c = code_point_at(p, end);
  if (c.length == 0) return {CharClass::other, 1};
  return {table().of(c.value), c.length};
}

inline const uint8_t* run(const uint8_t* p, const uint8_t* end, CharClass kind) {
  while (p < end) {
    const Char c = char_at(p, end);
    if (c.kind != kind) break;
    p += c.length;
  }
  return p;
}

inline bool newline(uint8_t c) { return c == '\n' || c == '\r'; }

// Length of 's 't 're 've 'm 'll 'd at p, or 0.
int contraction(const uint8_t* p, const uint8_t* end, bool fold) {
  if (p[0] != '\'' || end - p < 2) return 0;
  const uint8_t bit = fold ? 0x20 : 0;
  const uint8_t a = p[1] | bit;
  if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
  if (end - p < 3) return 0;
  const uint8_t b = p[2] | bit;
  return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

}  // namespace

CodePoint code_point_at(const uint8_t* p, const uint8_t* end) {
  const uint8_t lead = p[0];
  if (lead < 0x80) return {lead, 1};
  const uint8_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4 || end - p < length) return {0, 0};
  uint32_t c = lead & (0xFF >> (length + 1));
  for (int i = 1; i < length; ++i) {
    if ((p[i] & 0xC0) != 0x80) return {0, 0};
    c = c << 6 | (p[i] & 0x3F);
  }
  // Longer than it need be, half of a pair, or beyond Unicode.
  if (c < (length == 2 ? 0x80u : length == 3 ? 0x800u : 0x10000u) || (c >= 0xD800 && c < 0xE000) || c >= kCodePoints) return {0, 0};
  return {c, length};
}

Char char_at(const uint8_t* p, const uint8_t* end) {
  if (*p < 0x80) return {kAscii[*p], 1};
  return wide_char_at(p, end);
}

const uint8_t* Splitter::next(size_t& bytes) {
  if (at_ == end_) return nullptr;
  const uint8_t* const start = at_;
  if (at_ == part_end_) {  // only with cut_numbers: a number here is a word, otherwise a new part begins
    const Char first = char_at(at_, end_);
    if (first.kind == CharClass::number) {
      at_ = part_end_ = at_ + first.length;
      bytes = first.length;
      return start;
    }
    while (part_end_ < end_) {
      const Char c = char_at(part_end_, end_);
      if (c.kind == CharClass::number) break;
      part_end_ += c.length;
    }
  }
  at_ = word_end();
  bytes = static_cast<size_t>(at_ - start);
  return start;
}

const uint8_t* Splitter::word_end() const {
  const uint8_t* const p = at_;
  const uint8_t* const end = part_end_;
  const Char first = char_at(p, end);
  const uint8_t* const second = p + first.length;

  if (const int n = contraction(p, end, rules_.fold_contractions)) return p + n;

  // Letters and punctuation may take the one character before them; `kind` is what follows it.
  const bool space = *p == ' ';
  CharClass kind = first.kind;
  const uint8_t* body = p;
  if (second < end && (space || (rules_.any_prefix && first.kind != CharClass::letter && first.kind != CharClass::number && !newline(*p)))) {
    const CharClass next = char_at(second, end).kind;
    if (next == CharClass::letter || (space && (next == CharClass::other || (next == CharClass::number && rules_.number_space)))) {
      kind = next;
      body = second;
    }
  }

  if (kind == CharClass::letter) return run(body, end, CharClass::letter);
  if (kind == CharClass::number) {
    if (rules_.number_length == 0) return run(body, end, CharClass::number);
    for (int i = 0; i < rules_.number_length && body < end; ++i) {
      const Char c = char_at(body, end);
      if (c.kind != CharClass::number) break;
      body += c.length;
    }
    return body;
  }
  if (kind == CharClass::other) {
    body = run(body, end, CharClass::other);
    if (rules_.newlines) {
      while (body < end && newline(*body)) ++body;
    }
    return body;
  }

  // White space: up to its last newline if newlines count, else all of it but the last character when a word follows.
  const uint8_t* stop = p;
  const uint8_t* last = p;
  const uint8_t* after_newline = nullptr;
  while (stop < end) {
    const Char c = char_at(stop, end);
    if (c.kind != CharClass::space) break;
    last = stop;
    stop += c.length;
    if (newline(*last)) after_newline = stop;
  }
  if (rules_.newlines && after_newline) return after_newline;
  return stop == end || last == p ? stop : last;
}

}  // namespace limbeck::text
