// Errors as JavaScript exceptions with data, from which the typed layer makes its own.
#pragma once
#include <napi.h>

#include "core/error.h"

namespace limbeck {

inline Napi::Error to_js_error(Napi::Env env, const Error& e) {
  constexpr const char* kinds[] = {"shape", "dtype", "memory", "device", "config", "format", "data", "disposed", "internal"};
  Napi::Error error = Napi::Error::New(env, e.what());
  error.Set("kind", Napi::String::New(env, kinds[static_cast<size_t>(e.kind)]));
  const auto set = [&](const char* name, const std::string& text) {
    if (!text.empty()) error.Set(name, Napi::String::New(env, text));
  };
  set("code", e.code);
  set("op", e.op);
  set("argument", e.argument);
  set("expected", e.expected);
  set("actual", e.actual);
  return error;
}

}  // namespace limbeck
