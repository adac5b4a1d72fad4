#include "core/checks.h"

#include <string>

#include "core/fail.h"

namespace limbeck {

using Long = long long;

void check_attention(const Call& call, int first, bool square) {
  const View &q = call.in[first], &k = call.in[first + 1];
  const int64_t t = q.dims[1], h = q.dims[2], d = q.dims[3], s = k.dims[1], g = k.dims[2];
  const int64_t window = static_cast<int64_t>(call.scalar[2]);
  const auto refuse = [&](ErrorKind kind, const char* code, const char* argument, const Text& problem, const Text& expected,
                          int64_t actual) {
    fail(kind, code, call.op, argument, problem, expected, text("%lld", Long{actual}));
  };
  if (g < 1 || h < 1 || h % g != 0)
    refuse(ErrorKind::shape, "ERR_ATTENTION_HEADS", "q",
           text("q has %lld heads, which cannot share the %lld heads of k and v evenly", Long{h}, Long{g}),
           text("a multiple of %lld heads", Long{g}), h);
  if (d < 1)
    refuse(ErrorKind::shape, "ERR_SHAPE", "q", text("q has heads of size 0; a head needs at least one element"), text("1 or more"), d);
  if (square ? t != s : t > s)
    refuse(ErrorKind::shape, "ERR_ATTENTION_LENGTH", "k",
           square ? text("q has %lld positions and k has %lld; gradients need the same in both", Long{t}, Long{s})
                  : text("q has %lld positions and k has %lld; q must be the last positions of k", Long{t}, Long{s}),
           text(square ? "%lld positions" : "at least %lld positions", Long{t}), s);
  constexpr int64_t most_rows = (int64_t{1} << 31) - 1024;
  if (s > most_rows || t * (h / g) > most_rows)
    refuse(ErrorKind::shape, "ERR_ATTENTION_LENGTH", "k", text("sequences of %lld positions are not supported", Long{s}),
           text("at most %lld", Long{most_rows}), s);
  if (window < 0)
    refuse(ErrorKind::config, "ERR_ATTENTION_WINDOW", "window",
           text("window is %lld; give the number of keys that a query sees, itself included, or 0 for all", Long{window}),
           text("0 or more"), window);
  if (call.in[first + 3] && t != s)
    refuse(ErrorKind::shape, "ERR_ATTENTION_STARTS", "starts",
           text("starts is for whole sequences, but q has %lld positions and k has %lld", Long{t}, Long{s}),
           text("q and k of the same length"), t);
}

void check_attention_step(const Call& call) {
  const View &q = call.in[0], &keys = call.in[3];
  const int64_t h = q.dims[2], d = q.dims[3], r = keys.dims[1], g = keys.dims[2];
  if (g < 1 || h < 1 || h % g != 0 || d < 1)
    fail(ErrorKind::shape, "ERR_ATTENTION_HEADS", call.op, "q",
         text("q has %lld heads of size %lld, which cannot share the %lld heads of keys evenly", Long{h}, Long{d}, Long{g}),
         text("a multiple of %lld heads", Long{g}), text("%lld", Long{h}));
  if (r < 1)
    fail(ErrorKind::shape, "ERR_SHAPE", call.op, "keys", text("keys has room for no tokens"), text("1 or more"), text("0"));
}

void check_distill(const Call& call) {
  const View &targets = call.in[2], &tx = call.in[4], &tw = call.in[5], &tlogits = call.in[6], &tids = call.in[7], &tlogp = call.in[8];
  const int divergence = static_cast<int>(call.scalar[0]), tail = static_cast<int>(call.scalar[8]);
  const double param = call.scalar[1], param2 = call.scalar[2], temperature = call.scalar[3], ce_weight = call.scalar[6];
  const auto refuse = [&](const char* argument, const std::string& problem) {
    throw Error(ErrorKind::config, "ERR_CONFIG", std::string(call.op) + ": " + problem).in(call.op).on(argument);
  };
  const int teachers = (tx && tw ? 1 : 0) + (tlogits ? 1 : 0) + (tids && tlogp ? 1 : 0);
  if (teachers != 1 || static_cast<bool>(tx) != static_cast<bool>(tw) || static_cast<bool>(tids) != static_cast<bool>(tlogp))
    refuse("tx", "the teacher must be given in one way: tx with tw, tlogits, or tids with tlogp");
  if (divergence < 0 || divergence >= divergence_count) refuse("divergence", "there is no divergence " + std::to_string(divergence));
  if (tail < 0 || tail >= tail_count) refuse("tail", "there is no tail treatment " + std::to_string(tail));
  if (tids && divergence != forward_kl) refuse("divergence", "a sparse teacher (tids, tlogp) goes with the forward KL divergence only");
  if (!(temperature > 0)) refuse("temperature", "temperature is " + std::to_string(temperature) + ", it must be above 0");
  if (ce_weight != 0 && !targets) refuse("targets", "ce_weight is not 0, so targets must be given");
  if ((divergence == jsd || divergence == skew_forward_kl || divergence == skew_reverse_kl || divergence == adaptive) && !(param > 0 && param < 1))
    refuse("param", "param is " + std::to_string(param) + ", it must lie between 0 and 1");
  if (divergence == alpha_beta && !(param > 0 && param2 > 0)) refuse("param", "alpha and beta must both be above 0");
}

void check_blocks(const Call& call, const View& blocks, const char* argument, int64_t size) {
  const int64_t n = call.in[0].size(), wanted = (n + size - 1) / size;
  if (blocks.size() == wanted) return;
  fail(ErrorKind::shape, "ERR_SHAPE", call.op, argument,
       text("%s has %lld entries, but %lld parameters are %lld blocks of %lld", argument, Long{blocks.size()}, Long{n}, Long{wanted}, Long{size}),
       text("[%lld]", Long{wanted}), text("[%lld]", Long{blocks.size()}));
}

void check_concat(const Call& call) {
  const int64_t m = call.in[0].dims[1], n = call.in[1].dims[1], inner = call.in[0].dims[2], s = call.out[0].dims[1];
  if (s * inner == (m + n) * inner) return;
  fail(ErrorKind::shape, "ERR_SHAPE", call.op, "s", text("s must be m + n"), text("%lld", Long{m + n}), text("%lld", Long{s}));
}

void check_slice(const Call& call, int64_t start, int64_t m, int64_t n) {
  if (start >= 0 && start + m <= n) return;
  fail(ErrorKind::shape, "ERR_SHAPE", call.op, "start",
       text("elements %lld to %lld are outside a dimension of %lld", Long{start}, Long{start + m}, Long{n}), text("0 to %lld", Long{n}),
       text("%lld to %lld", Long{start}, Long{start + m}));
}

void check_even_head(const Call& call, int64_t d, const char* argument) {
  if (d > 0 && d % 2 == 0) return;
  fail(ErrorKind::shape, "ERR_SHAPE", call.op, argument,
       text("the head size is %lld, but rotary embedding turns pairs: it must be even and positive", Long{d}), text("an even number"),
       text("%lld", Long{d}));
}

void check_argmax(const Call& call) {
  if (call.in[0].cols() > 0 || call.in[0].rows() == 0) return;
  fail(ErrorKind::shape, "ERR_SHAPE", call.op, "x", text("x has rows of no elements, which have no largest one"), text("c > 0"), text("c = 0"));
}

void check_top_k(const Call& call) {
  const int64_t k = static_cast<int64_t>(call.scalar[0]), c = call.in[0].cols();
  if (k >= 1 && k <= c) return;
  fail(ErrorKind::shape, "ERR_SHAPE", call.op, "k", text("k is %lld of rows of %lld elements", Long{k}, Long{c}), text("1 to %lld", Long{c}),
       text("%lld", Long{k}));
}

Error error_of(Fault fault, const char* name, int64_t at, double given, int64_t below) {
  const std::string op = name, position = std::to_string(at), value = std::to_string(static_cast<int64_t>(given));
  const std::string limit = std::to_string(below), last = std::to_string(below - 1);
  const auto data = [&](const char* code, const char* argument, const std::string& problem) {
    return Error(ErrorKind::data, code, op + ": " + problem).in(op).on(argument);
  };
  switch (fault) {
    case Fault::table_row:
      return data("ERR_TOKEN_RANGE", "ids",
                  "token id " + value + " at position " + position + " is outside the table of " + limit +
                      " rows; tokenizer and model must agree on the vocabulary")
          .wanted("0 to " + last).got(value);
    case Fault::row_index:
      return data("ERR_TOKEN_RANGE", "ids", "index " + value + " at position " + position + " is outside a row of " + limit)
          .wanted("0 to " + last).got(value);
    case Fault::target:
      return data("ERR_TOKEN_RANGE", "targets",
                  "targets has token " + value + " at position " + position + ", outside the vocabulary of " + limit +
                      "; give tokens that do not count the weight 0")
          .wanted("0 to " + last).got(value);
    case Fault::teacher_token:
      return data("ERR_TOKEN_RANGE", "tids",
                  "tids has token " + value + " at position " + position + ", outside the vocabulary of " + limit +
                      "; teacher and student must share one vocabulary")
          .wanted("below " + limit).got(value);
    case Fault::teacher_twice:
      return data("ERR_TEACHER_TOKENS", "tids",
                  "tids names token " + value + " twice at position " + position +
                      "; the kept tokens of a position must differ (or, for samples, use tail 'truncate')");
    case Fault::teacher_mass: {
      const std::string mass = std::to_string(given);
      return data("ERR_TEACHER_MASS", "tlogp",
                  "the teacher's probabilities at position " + position + " sum to " + mass + "; tlogp must hold natural logarithms of probabilities")
          .wanted("at most 1").got(mass);
    }
    case Fault::document_start:
      return data("ERR_ATTENTION_STARTS", "starts",
                  "starts is " + value + " at row " + position + "; it should be the first position of that token's document")
          .wanted("a position from its predecessor's start to its own").got(value);
    case Fault::cache_row:
      return data("ERR_CACHE_ROW", "rows", "rows is " + value + " at " + position + ", the cache has " + limit + " sequences")
          .wanted("0 to " + last).got(value);
    case Fault::cache_position:
      return data("ERR_CACHE_POSITION", "positions", "positions is " + value + " at " + position).wanted("0 or more").got(value);
    case Fault::cache_row_twice:
      return data("ERR_CACHE_ROW", "rows", "rows names sequence " + value + " twice, again at " + position + "; give each sequence one token a step");
    case Fault::none: break;
  }
  return Error(ErrorKind::internal, "ERR_INTERNAL", op + ": a kernel reported a fault without a kind");
}

void raise(Fault fault, const char* op, int64_t position, double value, int64_t limit) { throw error_of(fault, op, position, value, limit); }

}  // namespace limbeck
