package userns

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func root(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
}

// ids are maps that no two tests mean the same people by.
var ids = Map{{0, 900000, 1000}, {1000, 910000, 1}}

func TestNamespacesBelongToIt(t *testing.T) {
	root(t)
	h, err := New(unix.CLONE_NEWNET|unix.CLONE_NEWUTS, ids, ids)
	if err != nil {
		t.Fatal(err)
	}
	user, err := h.Namespace("user")
	if err != nil {
		t.Fatal(err)
	}
	defer user.Close()
	joined, err := Join(user, unix.CLONE_NEWIPC)
	if err != nil {
		t.Fatal(err)
	}
	var files []*os.File
	for _, n := range []struct {
		h    *Holder
		name string
	}{{h, "net"}, {h, "uts"}, {joined, "ipc"}} {
		f, err := n.h.Namespace(n.name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, f)
	}
	h.Close()
	joined.Close()
	want, err := user.Stat()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		fd, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_USERNS)
		if err != nil {
			t.Fatal(err)
		}
		owner := os.NewFile(uintptr(fd), "owner")
		st, err := owner.Stat()
		owner.Close()
		if err != nil || !os.SameFile(st, want) {
			t.Errorf("%s belongs to another user namespace (%v)", f.Name(), err)
		}
	}
}

func TestMap(t *testing.T) {
	for in, want := range map[uint32]int64{0: 900000, 999: 900999, 1000: 910000, 1001: -1, 1 << 31: -1} {
		out, ok := ids.Outside(in)
		if ok != (want >= 0) || ok && int64(out) != want {
			t.Errorf("%d: %d %v", in, out, ok)
		}
	}
}

func TestMapsThatTheKernelRefuses(t *testing.T) {
	root(t)
	twice := Map{{0, 900000, 10}, {5, 910000, 10}}
	if _, err := New(0, twice, ids); err == nil || !strings.Contains(err.Error(), "map uid to 0 900000 10") {
		t.Errorf("got %v", err)
	}
}
