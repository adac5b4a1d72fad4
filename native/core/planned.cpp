#include "core/planned.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "core/threads.h"

namespace limbeck {

namespace {

// Addresses that nobody looks at.
class PlannedRange final : public Range {
 public:
  explicit PlannedRange(size_t bytes) : size_(bytes) {}
  char* base() const override { return reinterpret_cast<char*>(uintptr_t{1} << 44); }
  size_t size() const override { return size_; }
  bool commit(size_t) override { return true; }
  void give_back(const std::vector<std::pair<void*, size_t>>&) override {}

 private:
  size_t size_;
};

double bytes_of(const View& v) { return v ? static_cast<double>(v.size()) * static_cast<double>(size_of(v.dtype)) : 0; }

class Planned final : public Backend {
 public:
  Planned(const PlannedDevice& planned, std::vector<const KernelFamily*> families, std::shared_ptr<void> device)
      : planned_(planned), families_(std::move(families)), device_(std::move(device)), pool_(planned.threads) {}
  const char* name() const override { return "plan"; }
  const char* detail() const override { return "a plan"; }
  int threads() const override { return planned_.threads; }
  bool computes_bf16() const override { return planned_.bf16; }
  std::vector<const KernelFamily*> families() const override { return families_; }
  // Far more than any device has: that something does not fit is for the plan to say.
  size_t default_limit() const override { return size_t{1} << 44; }
  std::unique_ptr<Range> reserve(size_t bytes) override { return std::make_unique<PlannedRange>(bytes); }
  bool writes_at_once() const override { return true; }
  void prepare(Call& call) override {
    call.threads = &pool_;
    call.device = device_.get();
  }
  void run(const Kernel&, const Call&) override {}
  double time(const Kernel&, const Call& call) override {
    double bytes = 0;
    for (const View& v : call.in) bytes += bytes_of(v);
    for (int i = 0; i < kMaxTensors; ++i) bytes += bytes_of(call.out[i]) * (call.accumulate[i] ? 2 : 1);
    const double rate = std::string_view(call.op).ends_with("_fp8") ? planned_.fast_flops : planned_.flops;
    return std::max(flops_of(call) / rate, bytes / planned_.bandwidth);
  }
  void write(void*, const void*, size_t) override {}
  void read(void* to, const void*, size_t bytes, Done done) override {
    std::memset(to, 0, bytes);
    done(nullptr);
  }
  void sync(Done done) override { done(nullptr); }
  void drain() override {}
  void clear_fault() override {}

 private:
  PlannedDevice planned_;
  std::vector<const KernelFamily*> families_;
  std::shared_ptr<void> device_;
  ThreadPool pool_;
};

// Pairs of a query and a key that it sees: causal, within a window, the queries being the last of the keys.
double pairs(double queries, double keys, double window) {
  if (window <= 0 || window > keys) window = keys;
  const double first = keys - queries + 1;  // keys that the first query sees
  const double growing = std::clamp(window - first, 0.0, queries);
  return growing * first + growing * (growing - 1) / 2 + (queries - growing) * window;
}

}  // namespace

double flops_of(const Call& call) {
  const std::string_view op = call.op;
  const auto wanted = [&](int i) { return call.out[i] ? 1.0 : 0.0; };
  const auto product = [](const View& rows, const View& weight) {
    return 2.0 * static_cast<double>(rows.rows()) * static_cast<double>(weight.dims[0]) * static_cast<double>(weight.dims[1]);
  };
  if (op == "linear" || op == "linear_fp8") return product(call.in[0], call.in[1]);
  if (op == "linear_backward") return product(call.in[0], call.in[2]) * (wanted(0) + wanted(1));
  if (op == "gated_linear") return product(call.in[0], call.in[2]);
  if (op == "gated_linear_backward") return product(call.in[0], call.in[3]) * (std::max(wanted(0), wanted(1)) + wanted(2));
  if (op == "attention" || op == "attention_backward") {
    const bool forward = op == "attention";
    const View &q = call.in[forward ? 0 : 1], &k = call.in[forward ? 1 : 2];
    const double seen = pairs(static_cast<double>(q.dims[1]), static_cast<double>(k.dims[1]), call.scalar[2]);
    return (forward ? 4 : 10) * static_cast<double>(q.dims[0] * q.dims[2] * q.dims[3]) * seen;
  }
  if (op == "linear_cross_entropy") return product(call.in[0], call.in[1]) * (1 + wanted(4) + wanted(5));
  if (op == "linear_distill")
    return product(call.in[0], call.in[1]) * (1 + wanted(4) + wanted(5)) + (call.in[4] && call.in[5] ? product(call.in[4], call.in[5]) : 0);
  return 0;
}

std::unique_ptr<Backend> open_planned(const PlannedDevice& planned, std::vector<const KernelFamily*> families, std::shared_ptr<void> device) {
  return std::make_unique<Planned>(planned, std::move(families), std::move(device));
}

}  // namespace limbeck
