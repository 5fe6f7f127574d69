/* SPDX-License-Identifier: GPL-2.0 */
/* Reads the fields of a record from a struct sock. */
#ifndef CWNDTRACE_SOCK_H
#define CWNDTRACE_SOCK_H

#include "events.h"
#include "kernel.h"

#define AF_INET 2
#define AF_INET6 10
#define TCP_CA_LOSS 4
#define TCP_INIT_CWND 10
#define RTAX_INITCWND 11
/* dst_entry._metrics keeps flags in its low bits (include/net/dst.h). */
#define DST_METRICS_FLAGS 3UL

static __always_inline u32 sk_netns(const void *sk)
{
	return READ(u32, READ(u64, sk, sock_common, skc_net__net), net, ns__inum);
}

static __always_inline u32 sk_ifindex(const void *sk)
{
	u64 dst = READ(u64, sk, sock, sk_dst_cache);
	u64 dev = dst ? READ(u64, dst, dst_entry, dev) : 0;

	return dev ? READ(u32, dev, net_device, ifindex) : 0;
}

/*
 * Returns the id of the socket's cgroup (v2); 0 where the kernel doesn't keep it (facts.check_sock_cgroups() refuses a
 * filter by cgroup there). Before Linux 5.15 the pointer is in val, which is a number of cgroup v1's net_cls or
 * net_prio instead if one of its two low bits is set: see sock_cgroup_ptr() of Linux 5.10's include/linux/cgroup.h.
 */
static __always_inline u64 sk_cgroup(const void *sk)
{
	u64 shared = READ_OPT(u64, sk, sock, sk_cgrp_data__val);
	u64 cgroup = shared & 3 ? 0 : shared | READ_OPT(u64, sk, sock, sk_cgrp_data__cgroup);
	u64 node = cgroup ? READ_OPT(u64, cgroup, cgroup, kn) : 0;

	return node ? READ_OPT(u64, node, kernfs_node, id) : 0;
}

/* Returns the inode number of the socket's file, as in /proc/PID/fd and ss. */
static __always_inline u64 sk_inode(const void *sk)
{
	u64 socket = READ(u64, sk, sock, sk_socket);

	if (!socket)
		return 0;
	return READ(u64, AT(socket - OFF_socket_alloc__socket, socket_alloc, vfs_inode), inode, i_ino);
}

static __always_inline u16 sk_sport(const void *sk)
{
	return READ(u16, sk, sock_common, skc_num);
}

static __always_inline u16 sk_dport(const void *sk)
{
	return __builtin_bswap16(READ(u16, sk, sock_common, skc_dport));
}

/* Returns true if a process holds the socket lock. That process is then current. */
static __always_inline bool sk_owned(const void *sk)
{
	return READ(s32, sk, sock, sk_lock__owned) != 0;
}

/* Returns AF_INET for IPv4-mapped addresses as well, since their packets are IPv4. */
static __always_inline u8 sk_family(const void *sk)
{
	u32 daddr[4] = {};

	if (READ(u16, sk, sock_common, skc_family) != AF_INET6)
		return AF_INET;
	bpf_probe_read_kernel(daddr, sizeof(daddr), AT(sk, sock_common, skc_v6_daddr));
	if (!daddr[0] && !daddr[1] && daddr[2] == __builtin_bswap32(0xffff))
		return AF_INET;
	return AF_INET6;
}

/* Returns jiffies since data was last sent. tp->lsndtime is set when a segment with data is handed to IP. */
static __always_inline u32 sk_idle(const void *sk)
{
	return jiffies32() - READ(u32, sk, tcp_sock, lsndtime);
}

/*
 * Returns the jiffies that idle_us has for a reason, read before tcp_cwnd_application_limited() sets snd_cwnd_stamp to
 * now: it is called when the window hasn't been full for an RTO.
 */
static __always_inline u32 idle_for(const void *sk, u8 reason)
{
	if (reason == REASON_APP_LIMITED)
		return jiffies32() - READ(u32, sk, tcp_sock, snd_cwnd_stamp);
	return sk_idle(sk);
}

/* As tcp_init_cwnd() of net/ipv4/tcp_input.c, returns the route's initcwnd, else 10, but at most the clamp. */
static __always_inline u32 sk_init_cwnd(const void *sk)
{
	u64 dst = READ(u64, sk, sock, sk_dst_cache);
	u64 metrics = dst ? READ(u64, dst, dst_entry, _metrics) & ~DST_METRICS_FLAGS : 0;
	u32 clamp = READ(u32, sk, tcp_sock, snd_cwnd_clamp);
	u32 cwnd = 0;

	if (metrics)
		bpf_probe_read_kernel(&cwnd, sizeof(cwnd), (u32 *)metrics + RTAX_INITCWND - 1);
	if (!cwnd)
		cwnd = TCP_INIT_CWND;
	return cwnd < clamp ? cwnd : clamp;
}

/* Fills in all fields except the windows before, the reason and the probe. */
static __always_inline void fill_from_sock(struct cwnd_reset *r, const void *sk)
{
	u64 ca_ops = READ(u64, sk, inet_connection_sock, icsk_ca_ops);
	u32 received = READ(u32, sk, inet_connection_sock, icsk_ack__lrcvtime);

	r->ts_ns = bpf_ktime_get_ns();
	r->sock_cookie = READ(u64, sk, sock_common, skc_cookie);
	r->skaddr = (u64)sk;
	r->cgroup_id = sk_cgroup(sk);
	r->bytes_acked = READ(u64, sk, tcp_sock, bytes_acked);
	r->bytes_sent = READ(u64, sk, tcp_sock, bytes_sent);
	r->bytes_received = READ(u64, sk, tcp_sock, bytes_received);
	r->data_segs_in = READ(u32, sk, tcp_sock, data_segs_in);
	r->idle_us = jiffies_to_us(sk_idle(sk));
	r->last_rcv_us = jiffies_to_us(jiffies32() - received);
	r->rto_us = jiffies_to_us(READ(u32, sk, inet_connection_sock, icsk_rto));
	r->srtt_us = READ(u32, sk, tcp_sock, srtt_us) >> 3;
	r->min_rtt_us = READ(u32, sk, tcp_sock, rtt_min__s__v);
	r->mss = READ(u32, sk, tcp_sock, mss_cache);
	r->cwnd_after = READ(u32, sk, tcp_sock, snd_cwnd);
	r->ssthresh_after = READ(u32, sk, tcp_sock, snd_ssthresh);
	r->snd_wnd = READ(u32, sk, tcp_sock, snd_wnd);
	r->init_cwnd = sk_init_cwnd(sk);
	r->unsent_bytes = READ(u32, sk, tcp_sock, write_seq) - READ(u32, sk, tcp_sock, snd_nxt);
	r->unacked_bytes = READ(u32, sk, tcp_sock, snd_nxt) - READ(u32, sk, tcp_sock, snd_una);
	r->total_retrans = READ(u32, sk, tcp_sock, total_retrans);
	r->netns_ino = sk_netns(sk);
	r->ifindex = sk_ifindex(sk);
	r->tcp_state = READ(u8, sk, sock_common, skc_state);
	r->sport = sk_sport(sk);
	r->dport = sk_dport(sk);
	r->family = sk_family(sk);
	r->ca_state = READ_BITS(sk, inet_connection_sock, icsk_ca_state);
	if (READ(u16, sk, sock_common, skc_family) == AF_INET6) {
		bpf_probe_read_kernel(r->saddr, 16, AT(sk, sock_common, skc_v6_rcv_saddr));
		bpf_probe_read_kernel(r->daddr, 16, AT(sk, sock_common, skc_v6_daddr));
	} else {
		r->saddr[10] = r->saddr[11] = r->daddr[10] = r->daddr[11] = 0xff;
		bpf_probe_read_kernel(r->saddr + 12, 4, AT(sk, sock_common, skc_rcv_saddr));
		bpf_probe_read_kernel(r->daddr + 12, 4, AT(sk, sock_common, skc_daddr));
	}
	bpf_probe_read_kernel(r->ca_name, 16, AT(ca_ops, tcp_congestion_ops, name));
	if (sk_owned(sk)) {
		u64 pid_tgid = bpf_get_current_pid_tgid();
		u64 leader = READ(u64, bpf_get_current_task(), task_struct, group_leader);

		r->tgid = pid_tgid >> 32;
		r->tid = pid_tgid;
		bpf_get_current_comm(r->comm, sizeof(r->comm));
		bpf_probe_read_kernel(r->process, sizeof(r->process), AT(leader, task_struct, comm));
	}
}

#endif
