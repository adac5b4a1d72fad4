// The Node-API face of native/text: two classes, BpeEncoder and BpeTrainer. Bytes go in, typed arrays come out; long work runs
// beside the event loop on a copy of its input. src/tensor/text.ts is the twin.
#include <napi.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "binding/job.h"
#include "text/bpe.h"

namespace limbeck {
namespace {

using text::Encoder;
using text::Merge;
using text::SplitRules;
using text::Trainer;
using text::Vocabulary;

Error misuse(const char* text) { return Error(ErrorKind::internal, "ERR_INTERNAL", text); }

SplitRules rules_from(const Napi::Value& value) {
  const auto bits = static_cast<uint32_t>(value.As<Napi::Number>().Int64Value());
  SplitRules r;
  r.fold_contractions = bits & 1;
  r.any_prefix = bits & 2;
  r.newlines = bits & 4;
  r.number_space = bits & 8;
  r.cut_numbers = bits & 16;
  r.number_length = static_cast<int>(bits >> 8);
  return r;
}

template <class T>
std::vector<T> copy_of(const Napi::Value& value) {
  if (!value.IsTypedArray()) throw misuse("tokenizer: a typed array was expected");
  const auto array = value.As<Napi::TypedArray>();
  std::vector<T> copy(array.ByteLength() / sizeof(T));
  if (!copy.empty()) std::memcpy(copy.data(), static_cast<const char*>(array.ArrayBuffer().Data()) + array.ByteOffset(), copy.size() * sizeof(T));
  return copy;
}

std::string bytes_of(const Napi::Value& value) {
  if (value.IsString()) return value.As<Napi::String>().Utf8Value();
  if (!value.IsTypedArray()) throw misuse("tokenizer: a string or a Uint8Array was expected");
  const auto array = value.As<Napi::TypedArray>();
  return {static_cast<const char*>(array.ArrayBuffer().Data()) + array.ByteOffset(), array.ByteLength()};
}

template <class T>
Napi::Value array_of(Napi::Env env, const std::vector<T>& from) {
  auto to = Napi::TypedArrayOf<T>::New(env, from.size());
  if (!from.empty()) std::memcpy(to.Data(), from.data(), from.size() * sizeof(T));
  return to;
}

// Texts laid end to end, where each ends, and their ids.
std::vector<std::pair<std::string, int32_t>> entries_from(const Napi::Value& bytes, const Napi::Value& ends, const Napi::Value& ids) {
  const std::string all = bytes_of(bytes);
  const std::vector<int32_t> stop = copy_of<int32_t>(ends), id = copy_of<int32_t>(ids);
  if (stop.size() != id.size()) throw misuse("tokenizer: as many ends as ids were expected");
  std::vector<std::pair<std::string, int32_t>> entries;
  int32_t from = 0;
  for (size_t i = 0; i < stop.size(); ++i) {
    if (stop[i] < from || static_cast<size_t>(stop[i]) > all.size()) throw misuse("tokenizer: ends must rise within the text");
    entries.emplace_back(all.substr(from, stop[i] - from), id[i]);
    from = stop[i];
  }
  return entries;
}

// An encoder and the caches of the jobs that run on it: each job takes one and gives it back.
struct SharedEncoder {
  explicit SharedEncoder(Vocabulary vocabulary) : encoder(std::move(vocabulary)) {}

  Encoder::CachePtr take() {
    std::lock_guard lock(mutex);
    if (caches.empty()) return Encoder::make_cache();
    Encoder::CachePtr cache = std::move(caches.back());
    caches.pop_back();
    return cache;
  }
  void give(Encoder::CachePtr cache) {
    std::lock_guard lock(mutex);
    caches.push_back(std::move(cache));
  }

  const Encoder encoder;
  std::mutex mutex;
  std::vector<Encoder::CachePtr> caches;
};

class BpeEncoder final : public Napi::ObjectWrap<BpeEncoder> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "BpeEncoder", {InstanceMethod<&BpeEncoder::encode>("encode"), InstanceMethod<&BpeEncoder::encode_batch>("encodeBatch")});
  }

  // (byteIds, merges: left right result ..., rules, added bytes, ends, ids, whole bytes, ends, ids
  //  [, code points, their ids, joins: last first ..., prepend])
  explicit BpeEncoder(const Napi::CallbackInfo& info) : ObjectWrap(info) {
    guarded(info.Env(), [&] {
      Vocabulary v;
      v.byte_ids = copy_of<int32_t>(info[0]);
      const std::vector<int32_t> merges = copy_of<int32_t>(info[1]);
      for (size_t i = 0; i + 2 < merges.size(); i += 3) v.merges.push_back({merges[i], merges[i + 1], merges[i + 2]});
      v.rules = rules_from(info[2]);
      v.added = entries_from(info[3], info[4], info[5]);
      v.whole = entries_from(info[6], info[7], info[8]);
      if (info.Length() > 9) {
        v.characters = std::make_unique<text::Characters>();
        const std::vector<int32_t> codes = copy_of<int32_t>(info[9]), ids = copy_of<int32_t>(info[10]), joins = copy_of<int32_t>(info[11]);
        if (codes.size() != ids.size()) throw misuse("tokenizer: as many code points as ids were expected");
        for (size_t i = 0; i < codes.size(); ++i) v.characters->ids.emplace_back(codes[i], ids[i]);
        for (size_t i = 0; i + 1 < joins.size(); i += 2) v.characters->joins.emplace_back(joins[i], joins[i + 1]);
        v.characters->prepend = info[12].ToBoolean();
      }
      shared_ = std::make_shared<SharedEncoder>(std::move(v));
    });
  }

 private:
  // encode(text, added) -> Int32Array
  Napi::Value encode(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      const std::string text = bytes_of(info[0]);
      std::vector<int32_t> ids;
      Encoder::CachePtr cache = shared_->take();
      shared_->encoder.encode(text, info[1].ToBoolean(), *cache, ids);
      shared_->give(std::move(cache));
      return array_of(info.Env(), ids);
    });
  }

  // encodeBatch(bytes of all texts, where each ends, added) -> promise of [ids of all, where each ends]
  Napi::Value encode_batch(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      struct Batch {
        std::string text;
        std::vector<double> ends;
        std::vector<int32_t> ids;
      };
      auto batch = std::make_shared<Batch>();
      batch->text = bytes_of(info[0]);
      batch->ends = copy_of<double>(info[1]);
      double from = 0;
      for (const double end : batch->ends) {
        if (!(end >= from && end <= static_cast<double>(batch->text.size()))) throw misuse("tokenizer: ends must rise within the text");
        from = end;
      }
      const bool added = info[2].ToBoolean();
      return Job::start(
          info.Env(),
          [batch, added, shared = shared_] {
            Encoder::CachePtr cache = shared->take();
            size_t at = 0;
            for (double& end : batch->ends) {
              const auto stop = static_cast<size_t>(end);
              shared->encoder.encode(std::string_view(batch->text).substr(at, stop - at), added, *cache, batch->ids);
              end = static_cast<double>(batch->ids.size());
              at = stop;
            }
            shared->give(std::move(cache));
          },
          [batch](Napi::Env env) -> Napi::Value {
            Napi::Array result = Napi::Array::New(env, 2);
            result.Set(0u, array_of(env, batch->ids));
            result.Set(1u, array_of(env, batch->ends));
            return result;
          });
    });
  }

  std::shared_ptr<SharedEncoder> shared_;
};

class BpeTrainer final : public Napi::ObjectWrap<BpeTrainer> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "BpeTrainer",
                       {InstanceMethod<&BpeTrainer::count>("count"), InstanceMethod<&BpeTrainer::merge>("merge"),
                        InstanceMethod<&BpeTrainer::merges>("merges"), InstanceMethod<&BpeTrainer::words>("words")});
  }

  // (merges, minCount, maxBytes, rules)
  explicit BpeTrainer(const Napi::CallbackInfo& info) : ObjectWrap(info) {
    guarded(info.Env(), [&] {
      Trainer::Options options;
      options.merges = info[0].As<Napi::Number>().Int64Value();
      options.min_count = info[1].As<Napi::Number>().Int64Value();
      options.max_bytes = static_cast<size_t>(info[2].As<Napi::Number>().Int64Value());
      options.rules = rules_from(info[3]);
      shared_ = std::make_shared<Shared>(options);
    });
  }

 private:
  struct Shared {
    explicit Shared(const Trainer::Options& options) : trainer(options) {}
    Trainer trainer;
    std::mutex mutex;  // jobs that were not waited for run one after the other
    bool merging = false;
  };

  // count(text) -> promise
  Napi::Value count(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      if (shared_->merging) throw misuse("tokenizer: no text can be counted after the first merge");
      auto text = std::make_shared<std::string>(bytes_of(info[0]));
      return Job::start(
          info.Env(),
          [text, shared = shared_] {
            std::lock_guard lock(shared->mutex);
            shared->trainer.count(*text);
          },
          [](Napi::Env env) { return env.Undefined(); });
    });
  }

  // merge(limit) -> promise of whether training is over
  Napi::Value merge(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      shared_->merging = true;
      const int64_t limit = info[0].As<Napi::Number>().Int64Value();
      auto done = std::make_shared<bool>(false);
      return Job::start(
          info.Env(),
          [limit, done, shared = shared_] {
            std::lock_guard lock(shared->mutex);
            *done = shared->trainer.merge(limit);
          },
          [done](Napi::Env env) { return Napi::Boolean::New(env, *done); });
    });
  }

  // merges() -> Int32Array of left right ...
  Napi::Value merges(const Napi::CallbackInfo& info) {
    std::lock_guard lock(shared_->mutex);
    std::vector<int32_t> flat;
    for (const auto& [left, right] : shared_->trainer.merges()) {
      flat.push_back(left);
      flat.push_back(right);
    }
    return array_of(info.Env(), flat);
  }

  Napi::Value words(const Napi::CallbackInfo& info) {
    std::lock_guard lock(shared_->mutex);
    return Napi::Number::New(info.Env(), static_cast<double>(shared_->trainer.words()));
  }

  std::shared_ptr<Shared> shared_;
};

}  // namespace

void register_text(Napi::Env env, Napi::Object exports) {
  exports.Set("BpeEncoder", BpeEncoder::define(env));
  exports.Set("BpeTrainer", BpeTrainer::define(env));
}

}  // namespace limbeck
