/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The layouts of all records. No other file defines them.
 *
 * C includes this file; cwndtrace/records/layout.py parses it. The parser takes fixed-size integers, byte and
 * char arrays and enums, each field on a line of its own with a comment that opens with its unit in
 * brackets. The bracket also says how the field is shown: [addr] text address, [text] a string,
 * [dev] major:minor, [enum NAME] the label after the prefix of that enum. Padding must be explicit, so
 * fields are ordered by size.
 */
#ifndef CWNDTRACE_EVENTS_H
#define CWNDTRACE_EVENTS_H

#include <linux/types.h>

/* Values equal to enum tcp_cwnd_reset_reason of kernel-patches/. */
enum reason {
	REASON_IDLE = 0,	/* tcp_cwnd_restart: data after idle time longer than the RTO */
	REASON_RTO_LOSS = 1,	/* tcp_enter_loss: a retransmission timeout */
	REASON_APP_LIMITED = 2,	/* tcp_cwnd_application_limited: an RTO without using the window */
	REASON_TLP_LOSS = 3,	/* tcp_process_tlp_ack: a tail loss probe repaired a loss */
};

enum probe {
	PROBE_TRACEPOINT = 0,	/* tcp:tcp_cwnd_reset of a patched kernel */
	PROBE_FENTRY = 1,	/* fentry and fexit of the kernel's function */
	PROBE_KPROBE = 2,	/* kprobe and kretprobe of the kernel's function */
	PROBE_SENDMSG = 3,	/* the kernel's rule applied at tcp_sendmsg_locked, confirmed by the next ACK or send */
	PROBE_TCP_PROBE = 4,	/* windows compared between ACKs and transmits */
};

enum ca_state {
	CA_STATE_OPEN = 0,	/* nothing unusual */
	CA_STATE_DISORDER = 1,	/* duplicate ACKs or SACKs, nothing retransmitted */
	CA_STATE_CWR = 2,	/* reducing the window after ECN or local congestion */
	CA_STATE_RECOVERY = 3,	/* fast retransmit under way */
	CA_STATE_LOSS = 4,	/* recovering from a retransmission timeout */
};

/* The kernel's enum of the same meaning in include/net/tcp_states.h. */
enum tcp_state {
	TCP_STATE_ESTABLISHED = 1, /* open in both directions */
	TCP_STATE_SYN_SENT = 2,	/* the SYN isn't answered yet */
	TCP_STATE_SYN_RECV = 3,	/* the SYN-ACK isn't acknowledged yet; simultaneous open or fast open */
	TCP_STATE_FIN_WAIT1 = 4, /* closed here, and the peer hasn't acknowledged all of it */
	TCP_STATE_FIN_WAIT2 = 5, /* closed here, and all is acknowledged */
	TCP_STATE_TIME_WAIT = 6, /* closed at both ends */
	TCP_STATE_CLOSE = 7,	/* no connection */
	TCP_STATE_CLOSE_WAIT = 8, /* the peer has closed, this end still sends */
	TCP_STATE_LAST_ACK = 9,	/* closed at both ends, the peer's first, and not all is acknowledged */
	TCP_STATE_LISTEN = 10,	/* waits for connections */
	TCP_STATE_CLOSING = 11,	/* closed at both ends at once, and not all is acknowledged */
	TCP_STATE_NEW_SYN_RECV = 12, /* a request for a connection, which has no socket yet */
};

/* The numbers of Linux 6.18; block.h translates those of other kernels. */
enum op {
	OP_READ = 0,		/* REQ_OP_READ */
	OP_WRITE = 1,		/* REQ_OP_WRITE */
	OP_FLUSH = 2,		/* REQ_OP_FLUSH */
	OP_DISCARD = 3,		/* REQ_OP_DISCARD */
	OP_SECURE_ERASE = 5,	/* REQ_OP_SECURE_ERASE */
	OP_ZONE_APPEND = 7,	/* REQ_OP_ZONE_APPEND */
	OP_WRITE_ZEROES = 9,	/* REQ_OP_WRITE_ZEROES */
	OP_ZONE_OPEN = 11,	/* REQ_OP_ZONE_OPEN */
	OP_ZONE_CLOSE = 13,	/* REQ_OP_ZONE_CLOSE */
	OP_ZONE_FINISH = 15,	/* REQ_OP_ZONE_FINISH */
	OP_ZONE_RESET = 17,	/* REQ_OP_ZONE_RESET */
	OP_ZONE_RESET_ALL = 19,	/* REQ_OP_ZONE_RESET_ALL */
	OP_DRV_IN = 34,		/* REQ_OP_DRV_IN */
	OP_DRV_OUT = 35,	/* REQ_OP_DRV_OUT */
	OP_WRITE_SAME = 200,	/* REQ_OP_WRITE_SAME, until Linux 5.17; its number there is another operation's now */
};

enum blk_sts {
	BLK_STS_OK = 0,		/* done without error */
	BLK_STS_NOTSUPP = 1,	/* EOPNOTSUPP */
	BLK_STS_TIMEOUT = 2,	/* ETIMEDOUT */
	BLK_STS_NOSPC = 3,	/* ENOSPC */
	BLK_STS_TRANSPORT = 4,	/* ENOLINK */
	BLK_STS_TARGET = 5,	/* EREMOTEIO */
	BLK_STS_RESV_CONFLICT = 6, /* EBADE */
	BLK_STS_MEDIUM = 7,	/* ENODATA */
	BLK_STS_PROTECTION = 8,	/* EILSEQ */
	BLK_STS_RESOURCE = 9,	/* ENOMEM */
	BLK_STS_IOERR = 10,	/* EIO */
};

/* A congestion window that fell at once. */
struct cwnd_reset {
	__u64 ts_ns;		/* [ns] when the window fell, CLOCK_MONOTONIC */
	__u64 sock_cookie;	/* [id] socket cookie, as in ss -e; 0 where the kernel had not made one */
	__u64 skaddr;		/* [id] kernel address of the struct sock */
	__u64 cgroup_id;	/* [id] cgroup v2 of the socket */
	__u64 bytes_acked;	/* [bytes] acknowledged over the connection's life */
	__u64 bytes_sent;	/* [bytes] sent over its life, retransmissions included */
	__u64 idle_us;		/* [us] since data was last sent; for app_limited since the window was last full; to one jiffy */
	__u64 bytes_received;	/* [bytes] received over the connection's life */
	__u64 data_segs_in;	/* [segments] with data received over its life */
	__u64 last_rcv_us;	/* [us] since data last came in from the peer, to one jiffy */
	__u32 rto_us;		/* [us] retransmission timeout in force */
	__u32 srtt_us;		/* [us] smoothed round-trip time; 0 before the first sample */
	__u32 min_rtt_us;	/* [us] least round-trip time of the kernel's window; 4294967295 where none */
	__u32 mss;		/* [bytes] cached sender MSS */
	__u32 cwnd_before;	/* [segments] congestion window before */
	__u32 cwnd_after;	/* [segments] congestion window after */
	__u32 ssthresh_before;	/* [segments] slow start threshold before; 2147483647 where never set */
	__u32 ssthresh_after;	/* [segments] slow start threshold after; 2147483647 where never set */
	__u32 snd_wnd;		/* [bytes] window the peer offered */
	__u32 init_cwnd;	/* [segments] initial window of the route, the floor of a restart */
	__u32 unsent_bytes;	/* [bytes] queued and not yet sent; for idle, what was queued before the new data */
	__u32 unacked_bytes;	/* [bytes] sent and not yet acknowledged */
	__u32 total_retrans;	/* [segments] retransmitted over the connection's life */
	__u32 netns_ino;	/* [id] inode of the socket's network namespace */
	__u32 tgid;		/* [pid] process that was using the socket; 0 where a timer or an ACK did */
	__u32 tid;		/* [pid] its thread; 0 likewise */
	__u32 ifindex;		/* [id] device of the socket's route, 0 where it has none */
	__u32 tcp_state;	/* [enum tcp_state] state of the connection */
	__u16 sport;		/* [port] local */
	__u16 dport;		/* [port] remote */
	__u8 family;		/* [family] 2 IPv4 (mapped addresses too), 10 IPv6 */
	__u8 reason;		/* [enum reason] what made it fall */
	__u8 probe;		/* [enum probe] which probe saw it */
	__u8 ca_state;		/* [enum ca_state] congestion state right after */
	__u8 saddr[16];		/* [addr] local */
	__u8 daddr[16];		/* [addr] remote */
	char comm[16];		/* [text] name of the thread; empty where tgid is 0 */
	char process[16];	/* [text] name of the process, its first thread's; empty where tgid is 0 */
	char ca_name[16];	/* [text] congestion control */
};

enum outcome {
	OUTCOME_REGAINED = 0,	/* the window is what it was before the chain of resets */
	OUTCOME_RESET_AGAIN = 1, /* another reset came first */
	OUTCOME_LOSS = 2,	/* CWR, fast recovery or a timeout came first */
	OUTCOME_CLOSED = 3,	/* the connection ended first */
	OUTCOME_CAPTURE_END = 4, /* tracing ended first, with data unsent or in flight */
	OUTCOME_CAPTURE_END_IDLE = 5, /* tracing ended first, with all data acknowledged */
};

/*
 * How a window recovered from an idle or application-limited reset, and what the data sent meanwhile waited for. Resets
 * of a connection that hasn't regained its window in between are one chain.
 */
struct cwnd_recovery {
	__u64 reset_ts_ns;	/* [ns] when the window fell, as in cwnd_reset, CLOCK_MONOTONIC */
	__u64 end_ts_ns;	/* [ns] when following it ended; for regained the ACK that brought the window back */
	__u64 sock_cookie;	/* [id] socket cookie; 0 where the kernel had not made one */
	__u64 skaddr;		/* [id] kernel address of the struct sock */
	__u64 bytes_acked;	/* [bytes] acknowledged since the reset */
	__u64 bytes_received;	/* [bytes] received over the connection's life, when data was last in flight */
	__u64 data_segs_in;	/* [segments] with data received over its life, when data was last in flight */
	__u64 cost_us;		/* [us] by which the window delayed what was sent, compared with chain_window */
	__u64 first_cost_us;	/* [us] the part of it by which the window delayed the first burst */
	__u64 held_us;		/* [us] unsent data waited for the window, and chain_window had room for all of it */
	__u64 short_us;		/* [us] the window delayed data that wasn't all queued, or more than chain_window */
	__u64 after_loss_us;	/* [us] unsent data waited after a loss */
	__u64 other_us;		/* [us] unsent data waited though both windows had room: pacing, Nagle, small queues */
	__u64 busy_us;		/* [us] data was queued or unacknowledged, by the kernel's clock, to one jiffy */
	__u64 rwnd_limited_us;	/* [us] of these, the peer's window held data back, to one jiffy */
	__u64 sndbuf_limited_us; /* [us] of these, the send buffer held data back, to one jiffy */
	__u32 acks;		/* [count] ACKs and other segments received since the reset */
	__u32 target;		/* [segments] window before the reset */
	__u32 chain_window;	/* [segments] window to regain: the one before the first reset of the chain */
	__u32 chain_resets;	/* [count] resets of the chain so far, this one included */
	__u32 cwnd_start;	/* [segments] window that the reset left */
	__u32 cwnd_end;		/* [segments] window at the end */
	__u32 waiting_bytes;	/* [bytes] most data unsent and in flight while some of it waited for the window */
	__u32 bursts;		/* [count] times that all data was acknowledged */
	__u32 srtt_us;		/* [us] smoothed round-trip time at the end */
	__u32 netns_ino;	/* [id] inode of the socket's network namespace */
	__u32 ssthresh_end;	/* [segments] slow start threshold at the end; 2147483647 where never set */
	__u16 cpu;		/* [id] CPU on which following ended */
	__u8 reason;		/* [enum reason] what made the window fall */
	__u8 outcome;		/* [enum outcome] how following ended */
};

/* The window of a socket that is being followed, at most once per round-trip time. */
struct cwnd_sample {
	__u64 ts_ns;		/* [ns] when it was seen, CLOCK_MONOTONIC */
	__u64 reset_ts_ns;	/* [ns] the reset that it follows */
	__u64 sock_cookie;	/* [id] socket cookie; 0 where the kernel had not made one */
	__u64 skaddr;		/* [id] kernel address of the struct sock */
	__u32 cwnd;		/* [segments] congestion window */
	__u32 ssthresh;		/* [segments] slow start threshold; 2147483647 where never set */
	__u32 packets_out;	/* [segments] in flight */
	__u32 srtt_us;		/* [us] smoothed round-trip time */
};

/* A finished block request. */
struct block_io {
	__u64 start_ns;		/* [ns] entered the block layer, CLOCK_MONOTONIC */
	__u64 issue_ns;		/* [ns] given to the driver; 0 where it never was */
	__u64 done_ns;		/* [ns] finished */
	__u64 sector;		/* [sectors of 512 bytes] first sector */
	__u64 cgroup_id;	/* [id] cgroup v2 of the submitting task */
	__u64 owner_cgroup_id;	/* [id] cgroup v2 charged for what the root cgroup (kernel threads) submits; else cgroup_id */
	__u32 bytes;		/* [bytes] length when issued */
	__u32 dev;		/* [dev] disk, major << 20 | minor */
	__u32 flags;		/* [flags] request flags, REQ_* of linux/blk_types.h, operation excluded */
	__u32 tgid;		/* [pid] submitting process */
	__u32 tid;		/* [pid] submitting thread */
	__u16 cpu;		/* [id] CPU that finished it */
	__u8 op;		/* [enum op] operation */
	__u8 error;		/* [enum blk_sts] status it finished with */
	char comm[16];		/* [text] name of the submitter; of its process for io_uring workers */
};

#endif
