// NVIDIA's libraries that are opened when they are needed, so that a machine without them can load the backend and say what is missing.
#pragma once
#include <string>
#include <vector>

namespace limbeck::cuda {

enum class Vendor { cublaslt, nccl };

// Where a library was looked for and what was there.
struct Place {
  std::string path, problem;
};

struct Library {
  void* handle = nullptr;  // null: it was not found
  std::string path;        // the file that was opened
  std::vector<Place> places;  // where it was looked for in vain, in order

  // The function of that name, or null.
  void* symbol(const char* name) const;
  template <class F>
  void symbol(const char* name, F*& function) const {
    function = reinterpret_cast<F*>(symbol(name));
  }
};

// Looks once; later calls give the same answer. Places in order: the path that LIMBECK_CUBLASLT_PATH or LIMBECK_NCCL_PATH names (a file
// or a folder; then nothing else), beside this library, the toolkit, Python wheels, the system's own search path.
const Library& library(Vendor vendor);

// The same, but a missing one is an Error of kind device, ERR_LIBRARY_MISSING, that lists the places and the fix.
const Library& require(Vendor vendor);

// What was found, as JSON: [{"name", "path", "version", "lookedIn"}]; path and version are empty where there is none.
std::string libraries_json();

// A text as a JSON string.
std::string quoted(const std::string& text);

}  // namespace limbeck::cuda
