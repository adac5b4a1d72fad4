// Errors carry data, so that the JavaScript side can rebuild a typed error: it never parses text.
#pragma once
#include <stdexcept>
#include <string>
#include <utility>

namespace limbeck {

enum class ErrorKind { shape, dtype, memory, device, config, format, data, disposed, internal };

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, std::string code, const std::string& message) : std::runtime_error(message), kind(kind), code(std::move(code)) {}

  Error& in(std::string op_name) { op = std::move(op_name); return *this; }
  Error& on(std::string name) { argument = std::move(name); return *this; }
  Error& wanted(std::string text) { expected = std::move(text); return *this; }
  Error& got(std::string text) { actual = std::move(text); return *this; }

  ErrorKind kind;
  std::string code;  // stable, ERR_...
  std::string op, argument, expected, actual;
};

}  // namespace limbeck
