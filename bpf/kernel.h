/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Reads kernel structures at offsets that come from the running kernel's BTF.
 *
 * A member is named once, where it is read: READ(type, base, struct, member). cwndtrace/kernel/offsets.py finds
 * these calls, looks each member up, and passes OFF_<struct>__<member> and SIZE_<struct>__<member> as
 * -D integers. "a__b" is the member b of the member a of struct. A member that the kernel doesn't have is an error
 * that names it, except in READ_OPT and LOAD_OPT, which then return 0.
 */
#ifndef CWNDTRACE_KERNEL_H
#define CWNDTRACE_KERNEL_H

#include <linux/types.h>

#define READ(T, base, type, member) ({							\
	T value_ = 0;									\
	_Static_assert(sizeof(T) == SIZE_##type##__##member,				\
		       #type "." #member " has another size in this kernel");		\
	bpf_probe_read_kernel(&value_, sizeof(value_),					\
			      (const char *)(base) + OFF_##type##__##member);		\
	value_;										\
})

#define READ_OPT(T, base, type, member) ({						\
	T value_ = 0;									\
	if (SIZE_##type##__##member == sizeof(T))					\
		bpf_probe_read_kernel(&value_, sizeof(value_),				\
				      (const char *)(base) + OFF_##type##__##member);	\
	value_;										\
})

/* Reads an unsigned member whose width differs between kernels: at most 32 bits. */
#define READ_NUMBER(base, type, member) ({						\
	u32 value_ = 0;									\
	_Static_assert(SIZE_##type##__##member <= sizeof(value_),			\
		       #type "." #member " is too wide in this kernel");		\
	bpf_probe_read_kernel(&value_, SIZE_##type##__##member,				\
			      (const char *)(base) + OFF_##type##__##member);		\
	value_;										\
})

/*
 * Does what READ does where the verifier knows base's type, as it does for a tp_btf program's arguments and the
 * structures that they lead to. It is a load, not a call. A fault reads 0.
 */
#define LOAD(T, base, type, member) ({							\
	_Static_assert(sizeof(T) == SIZE_##type##__##member,				\
		       #type "." #member " has another size in this kernel");		\
	*(volatile T *)((const char *)(base) + OFF_##type##__##member);			\
})

#define LOAD_OPT(T, base, type, member)							\
	(SIZE_##type##__##member == sizeof(T) ?						\
	 *(volatile T *)((const char *)(base) + OFF_##type##__##member) : 0)

/* Loads the lowest byte of a member whose width differs between kernels. */
#define LOAD_BYTE(base, type, member) (*(volatile u8 *)AT(base, type, member))

/* Loads a bitfield that lies within one byte. */
#define LOAD_BITS(base, type, member)							\
	(*(volatile u8 *)((const char *)(base) + OFF_##type##__##member) >> SHIFT_##type##__##member &	\
	 ((1 << BITS_##type##__##member) - 1))

/*
 * Returns an argument of the program as a number. A tp_btf program's arguments are pointers: the verifier allows no
 * arithmetic on them, and takes them for non-NULL even where the kernel may pass NULL.
 */
static __always_inline u64 argument(const struct bpf_raw_tracepoint_args *ctx, int n)
{
	u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), &ctx->args[n]);
	return value;
}

/* Says which argument of a tracepoint points to a struct. Its place differs between kernels. */
#define ARGUMENT(tracepoint, type) ARG_##tracepoint##__##type

/* Reads a bitfield that lies within one byte, as the kernel's small TCP flags do. */
#define READ_BITS(base, type, member) ({							\
	u8 byte_ = 0;									\
	bpf_probe_read_kernel(&byte_, 1, (const char *)(base) + OFF_##type##__##member);	\
	(byte_ >> SHIFT_##type##__##member) & ((1 << BITS_##type##__##member) - 1);	\
})

/* Returns the address of an embedded member, to read an array or further members there. */
#define AT(base, type, member) ((const char *)(base) + OFF_##type##__##member)

/* The value of an enumerator, or fallback where this kernel has no such enum. */
#define ENUMERATOR(name, fallback) ENUM_##name

static __always_inline u32 jiffies32(void)
{
	return (u32)bpf_jiffies64();
}

static __always_inline u64 jiffies_to_us(u32 jiffies)
{
	/* With most values of HZ this is no division. */
	return 1000000 % CWT_HZ ? jiffies * 1000000ULL / CWT_HZ : jiffies * (1000000ULL / CWT_HZ);
}

#endif
