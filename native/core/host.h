// The backend of this machine's processor: kernels run on the stream's thread and its pool, so every call is done when it returns.
#pragma once
#include <memory>

#include "core/backend.h"
#include "core/families.h"

namespace limbeck {

std::unique_ptr<Backend> open_host(int threads, const IsaKernels& kernels);

}  // namespace limbeck
