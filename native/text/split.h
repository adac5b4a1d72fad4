// Pre-tokenizers: the regular expressions of the GPT-2 family, written by hand over UTF-8.
#pragma once
#include <cstddef>
#include <cstdint>

namespace limbeck::text {

enum class CharClass : uint8_t { other = 0, letter = 1, number = 2, space = 3 };

struct Char {
  CharClass kind;
  uint8_t length;  // bytes
};

struct CodePoint {
  uint32_t value;
  uint8_t length;  // bytes; 0: no valid sequence starts here
};

// The character that starts at `p`. A byte that starts no valid sequence is a character of its own, of class other.
Char char_at(const uint8_t* p, const uint8_t* end);
CodePoint code_point_at(const uint8_t* p, const uint8_t* end);

// What tells one expression of the family from another. All default: GPT-2's
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
struct SplitRules {
  bool fold_contractions = false;  // (?i:'s|'t|...), ASCII case
  bool any_prefix = false;         // [^\r\n\p{L}\p{N}]?\p{L}+ instead of  ?\p{L}+
  bool newlines = false;           // [\r\n]* after punctuation, and \s*[\r\n]+ before the other white space
  bool number_space = true;        // ' ?' before numbers
  bool cut_numbers = false;        // every number character is cut out first (Digits before ByteLevel)
  int number_length = 0;           // \p{N}{1,n}; 0: any length
};

// Walks the words of one text.
class Splitter {
 public:
  Splitter(const SplitRules& rules, const uint8_t* text, size_t bytes) : rules_(rules), at_(text), part_end_(text), end_(text + bytes) {
    if (!rules.cut_numbers) part_end_ = end_;
  }
  // The next word, or null at the end; words cover the text without gaps and are never empty.
  const uint8_t* next(size_t& bytes);

 private:
  const uint8_t* word_end() const;

  const SplitRules rules_;
  const uint8_t* at_;
  const uint8_t* part_end_;  // what lookahead may see: the end of the text or the next number that is cut out
  const uint8_t* end_;
};

}  // namespace limbeck::text
