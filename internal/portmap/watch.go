package portmap

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// settleTime is how long others must leave nf_tables alone before it is looked at: a firewall's reload is several transactions.
const settleTime = 100 * time.Millisecond

// Watch calls changed after others' changes of nf_tables, with the time of the last one: tables, chains and rules, not elements, since those
// change with every port that somebody publishes, nor the chains that come with our own ports. It returns when ctx ends. It costs
// a socket and, while nothing happens, no more.
func Watch(ctx context.Context, changed func(at time.Time)) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("watch nftables: %w", err)
	}
	f := os.NewFile(uintptr(fd), "nftables events")
	defer f.Close()
	// The filter first: nothing else shall come.
	if err := filterEvents(fd); err != nil {
		return fmt.Errorf("watch nftables: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)}); err != nil {
		return fmt.Errorf("watch nftables: %w", err)
	}
	defer context.AfterFunc(ctx, func() { f.SetReadDeadline(time.Unix(1, 0)) })()
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	for {
		err := raw.Read(func(fd uintptr) bool { return drain(int(fd)) })
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("watch nftables: %w", err)
		}
		at := time.Now()
		t := time.NewTimer(settleTime)
		for quiet := false; !quiet; {
			select {
			case <-ctx.Done():
				t.Stop()
				return nil
			case <-t.C:
			}
			if quiet = !drain(fd); !quiet {
				at = time.Now()
				t.Reset(settleTime)
			}
		}
		changed(at)
	}
}

// drain empties the socket and reports whether something was in it, be it too much.
func drain(fd int) (some bool) {
	var b [64]byte // the filter has looked at them already
	for {
		_, _, err := unix.Recvfrom(fd, b[:], unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return some
		case err != nil && !errors.Is(err, unix.ENOBUFS):
			return some
		default:
			some = true
		}
	}
}

// filterEvents lets the kernel drop notices of elements, the numbers of generations that end every transaction, and what our own ports
// bring along: chains and rules that are new in a table of conex, and the end of log chains.
func filterEvents(fd int) error {
	typ := func(msg uint16) uint32 { // as a load of a 16-bit number in network order sees it
		return uint32(binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.NFNL_SUBSYS_NFTABLES<<8|msg)))
	}
	const (
		typeAt  = 4               // nlmsghdr.nlmsg_type
		tableAt = 16 + 4 + 4      // behind nlmsghdr, nfgenmsg and the first attribute's head
		chainAt = tableAt + 8 + 4 // of a table whose name has up to seven letters
		cone    = uint32('c')<<24 | 'o'<<16 | 'n'<<8 | 'e'
		logp    = uint32('l')<<8 | 'o'
	)
	load := func(size uint16, at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | size | unix.BPF_ABS, K: at}
	}
	equal := func(v uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: v, Jt: yes, Jf: no}
	}
	filter := []unix.SockFilter{
		load(unix.BPF_H, typeAt),
		equal(typ(unix.NFT_MSG_NEWSETELEM), 13, 0),
		equal(typ(unix.NFT_MSG_DELSETELEM), 12, 0),
		equal(typ(unix.NFT_MSG_NEWGEN), 11, 0),
		equal(typ(unix.NFT_MSG_NEWCHAIN), 3, 0),
		equal(typ(unix.NFT_MSG_NEWRULE), 2, 0),
		equal(typ(unix.NFT_MSG_DELCHAIN), 3, 0),
		equal(typ(unix.NFT_MSG_DELRULE), 2, 6),
		load(unix.BPF_W, tableAt),
		equal(cone, 5, 4),
		load(unix.BPF_W, tableAt),
		equal(cone, 0, 2),
		load(unix.BPF_H, chainAt),
		equal(logp, 1, 0),
		{Code: unix.BPF_RET | unix.BPF_K, K: 1 << 16},
		{Code: unix.BPF_RET | unix.BPF_K},
	}
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
}
