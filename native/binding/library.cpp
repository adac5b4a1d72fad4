#include "binding/library.h"

#include <dlfcn.h>

#include <map>
#include <mutex>

namespace limbeck {

const BackendLibrary& backend_library(const std::string& path) {
  static std::mutex mutex;
  static std::map<std::string, const BackendLibrary*> opened;
  std::lock_guard lock(mutex);
  if (const auto it = opened.find(path); it != opened.end()) return *it->second;
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle)
    throw Error(ErrorKind::device, "ERR_BACKEND_MISSING", "limbeck: the backend library could not be opened: " + std::string(dlerror()) + "; build it with: npm run build:cuda").on(path);
  const auto function = reinterpret_cast<BackendLibraryFunction>(dlsym(handle, kBackendSymbol));
  const BackendLibrary* library = function ? function() : nullptr;
  if (!library || library->abi != kBackendAbi || library->call_bytes != sizeof(Call) || library->view_bytes != sizeof(View)) {
    const std::string actual = library ? "version " + std::to_string(library->abi) : "no backend at all";
    throw Error(ErrorKind::device, "ERR_BACKEND_ABI",
                "limbeck: " + path + " is " + actual + ", this core needs a backend of version " + std::to_string(kBackendAbi) + " built from the same sources; build it again with: npm run build:cuda")
        .on(path).wanted("version " + std::to_string(kBackendAbi)).got(actual);
  }
  opened.emplace(path, library);
  return *library;
}

}  // namespace limbeck
