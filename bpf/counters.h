/* SPDX-License-Identifier: GPL-2.0 */
/* What each CPU counts beside the records that it hands over. */
#ifndef CWNDTRACE_COUNTERS_H
#define CWNDTRACE_COUNTERS_H

#include "events.h"
#include "kernel.h"

/* One entry that holds all of them, so that user space needs one look-up. */
struct counters {
	u64 lost;		/* records for which the ring buffer had no room, or a map no memory */
	u64 unchanged;		/* calls that left the window as it was */
	u64 withdrawn;		/* restarts that were due and didn't happen, as when a send blocked */
	u64 lost_recoveries;
	u64 lost_samples;
};
BPF_PERCPU_ARRAY(counters, struct counters, 1);

static __always_inline struct counters *counters_here(void)
{
	int zero = 0;

	return counters.lookup(&zero);
}

/* Add n to one counter. bcc rewrites no look-up that stands in a macro. */
#define count(counter, n) do {					\
	struct counters *here_ = counters_here();		\
								\
	if (here_)						\
		here_->counter += (n);				\
} while (0)

#endif
