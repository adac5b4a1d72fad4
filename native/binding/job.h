// Long work beside the event loop: a promise of what a thread of Node's pool does, and errors that the typed layer can rebuild.
#pragma once
#include <napi.h>

#include <functional>
#include <memory>
#include <utility>

#include "binding/error.h"

namespace limbeck {

// Runs `body`; what it throws becomes a JavaScript exception that the typed layer can rebuild.
template <class Body>
auto guarded(Napi::Env env, Body&& body) {
  try {
    return body();
  } catch (const Error& e) {
    throw to_js_error(env, e);
  } catch (const std::bad_alloc&) {
    throw to_js_error(env, Error(ErrorKind::memory, "ERR_OUT_OF_MEMORY", "limbeck: the system has no memory left"));
  }
}

// A promise of work done on a thread of the pool.
class Job final : public Napi::AsyncWorker {
 public:
  using Work = std::function<void()>;
  using Finish = std::function<Napi::Value(Napi::Env)>;

  static Napi::Value start(Napi::Env env, Work work, Finish finish) {
    auto* job = new Job(env, std::move(work), std::move(finish));
    Napi::Promise promise = job->deferred_.Promise();
    job->Queue();
    return promise;
  }

 private:
  Job(Napi::Env env, Work work, Finish finish)
      : AsyncWorker(env, "limbeck.job"), deferred_(Napi::Promise::Deferred::New(env)), work_(std::move(work)), finish_(std::move(finish)) {}

  void Execute() override {
    try {
      work_();
    } catch (const Error& e) {
      fault_ = std::make_unique<Error>(e);
    } catch (const std::bad_alloc&) {
      fault_ = std::make_unique<Error>(ErrorKind::memory, "ERR_OUT_OF_MEMORY", "limbeck: the system has no memory left");
    }
  }
  void OnOK() override {
    if (fault_) deferred_.Reject(to_js_error(Env(), *fault_).Value());
    else deferred_.Resolve(finish_(Env()));
  }
  void OnError(const Napi::Error& e) override { deferred_.Reject(e.Value()); }

  Napi::Promise::Deferred deferred_;
  Work work_;
  Finish finish_;
  std::unique_ptr<Error> fault_;
};

}  // namespace limbeck
