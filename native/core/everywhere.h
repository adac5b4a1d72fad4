// Code that runs on a GPU as well.
#pragma once

#ifdef __CUDACC__
#define LIMBECK_EVERYWHERE __host__ __device__
#else
#define LIMBECK_EVERYWHERE
#endif
