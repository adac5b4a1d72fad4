// Backend libraries, opened at run time.
#pragma once
#include <string>

#include "core/backend.h"

namespace limbeck {

// Opens the library once for the whole process. Throws Error of kind device when it cannot be opened or was built for another version.
const BackendLibrary& backend_library(const std::string& path);

}  // namespace limbeck
