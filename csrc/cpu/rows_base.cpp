#define DPO_NAMESPACE base
#include "rows_impl.h"
