// SPDX-License-Identifier: GPL-2.0
/* Traces resets with fentry and fexit: notes the window on entry to the kernel's function and compares on return. */
#include "reset.h"
#include "window_before.h"

#if REASON == 0
#define FUNCTION tcp_cwnd_restart
#elif REASON == 1
#define FUNCTION tcp_enter_loss
#else
#define FUNCTION tcp_cwnd_application_limited
#endif

/* The socket is locked between entry and return, so its address is sufficient as the key. */
BPF_HASH(entered, u64, struct before, 16384);

static __always_inline int fentry_in(const void *sk)
{
	struct before b = note_before(sk);

	if (entered.update(&b.sk, &b))
		count(lost, 1);
	return 0;
}

static __always_inline int fentry_out(const void *sk)
{
	u64 key = (u64)sk;
	struct before *b = entered.lookup(&key);

	if (!b)
		return 0;
	/* b->sk is a plain number; the verifier allows no arithmetic on the argument itself. */
	emit_fallen((const void *)b->sk, PROBE_FENTRY, b->cwnd, b->ssthresh, b->idle, 0);
	entered.delete(&key);
	return 0;
}

/* These add a level of macros, so that FUNCTION is expanded before bcc pastes it into the program's name. */
#define ENTRY_OF(function) KFUNC_PROBE(function, void *sk)
#define EXIT_OF(function) KRETFUNC_PROBE(function, void *sk)

ENTRY_OF(FUNCTION)
{
	return fentry_in(sk);
}

EXIT_OF(FUNCTION)
{
	return fentry_out(sk);
}
