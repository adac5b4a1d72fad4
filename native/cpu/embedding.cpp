// Rows of a table by number.
#include "core/checks.h"
#include "cpu/lanes.h"

namespace limbeck::cpu::LIMBECK_ISA {

static void check_id(const Call& call, int32_t id, int64_t position, int64_t rows) {
  if (id >= 0 && id < rows) return;
  raise(Fault::table_row, call.op, position, id, rows);
}

template <class T>
static void embed(const Call& call, const T* table) {
  const int32_t* ids = call.in[0].as<int32_t>();
  const int64_t v = call.in[1].dims[0], c = call.in[1].dims[1];
  const float scale = static_cast<float>(call.scalar[0]);
  const Sink y(call, 0);
  for_rows(call, call.in[0].size(), c, [&, scale](int64_t row) {
    check_id(call, ids[row], row, v);
    const T* from = table + ids[row] * c;
    for_lanes(0, c, [=](int64_t i, auto lanes) { y.put(row * c + i, lanes, lanes.get(from + i) * scale); });
  });
}

// embedding(ids[*]:i32, table[v c]:float, scale) -> y[* c]
static void embedding(const Call& call) {
  if (call.in[1].dtype == DType::bf16)
    embed(call, call.in[1].as<uint16_t>());
  else
    embed(call, call.in[1].as<float>());
}

static size_t embedding_backward_bytes(const Call& call) {
  return sizeof(int32_t) * static_cast<size_t>(call.in[2].dims[0] + call.in[1].size());
}

// embedding_backward(dy[* c], ids[*]:i32, table[v c]:float, scale) -> dtable[v c]:f32+
// Every row of the table has a list of its tokens in order, so that one thread sums a row, always in the same order.
static void embedding_backward(const Call& call) {
  if (!call.out[0]) return;
  const float* dy = call.in[0].as<float>();
  const int32_t* ids = call.in[1].as<int32_t>();
  const int64_t tokens = call.in[1].size(), v = call.in[2].dims[0], c = call.in[2].dims[1];
  const float scale = static_cast<float>(call.scalar[0]);
  float* dtable = call.out[0].as<float>();
  const bool accumulate = call.accumulate[0];

  int32_t* first = static_cast<int32_t*>(call.workspace);
  int32_t* next = first + v;
  for (int64_t i = 0; i < tokens; ++i) check_id(call, ids[i], i, v);
  std::memset(first, 0xff, static_cast<size_t>(v) * sizeof(int32_t));
  for (int64_t i = tokens; i-- > 0;) {
    next[i] = first[ids[i]];
    first[ids[i]] = static_cast<int32_t>(i);
  }

  // Frequent tokens often are neighbours in the table: small tiles spread them over the threads.
  const int64_t tile = (rows_per_chunk(c) + 7) / 8;
  for_chunks(call, v, tile, [=](int64_t begin, int64_t end) {
    for (int64_t id = begin; id < end; ++id) {
      float* to = dtable + id * c;
      if (first[id] < 0) {
        if (!accumulate) std::memset(to, 0, static_cast<size_t>(c) * sizeof(float));
        continue;
      }
      bool add = accumulate;
      for (int32_t token = first[id]; token >= 0; token = next[token], add = true) {
        const float* from = dy + token * c;
        for_lanes(0, c, [=](int64_t i, auto lanes) {
          const Vec d = lanes.get(from + i) * scale;
          lanes.put(to + i, add ? lanes.get(to + i) + d : d);
        });
      }
    }
  });
}

}  // namespace limbeck::cpu::LIMBECK_ISA

LIMBECK_KERNELS(embedding, {"embedding", embedding}, {"embedding_backward", embedding_backward, embedding_backward_bytes})
