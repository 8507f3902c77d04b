// How many threads the `region`-th parallel region gets of those it asks for.
#pragma once
#include <algorithm>

int threads_given(int asked, unsigned region);
