package netlink

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// newNetNS makes a network namespace that lives as long as its file.
func newNetNS(t *testing.T) *os.File {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("making a network namespace needs root")
	}
	type result struct {
		f   *os.File
		err error
	}
	ch := make(chan result)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread dies with this goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		var f *os.File
		if err == nil {
			f, err = os.Open("/proc/thread-self/ns/net")
		}
		ch <- result{f, err}
	}()
	r := <-ch
	if r.err != nil {
		t.Fatal(r.err)
	}
	t.Cleanup(func() { r.f.Close() })
	return r.f
}

// link is struct ifinfomsg for an index.
func link(index uint32, up bool) Attrs {
	b := make(Attrs, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(b[4:], index)
	if up {
		binary.NativeEndian.PutUint32(b[8:], unix.IFF_UP)
		binary.NativeEndian.PutUint32(b[12:], unix.IFF_UP)
	}
	return b
}

func TestExecute(t *testing.T) {
	c, err := DialIn(unix.NETLINK_ROUTE, newNetNS(t))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 3 { // one socket serves many batches
		res, err := c.Execute(
			Message{Type: unix.RTM_GETLINK, Data: link(0, false).String(unix.IFLA_IFNAME, "nosuch0")},
			Message{Type: unix.RTM_SETLINK, Data: link(1, true)},
			Message{Type: unix.RTM_GETLINK, Data: link(1, false)},
		)
		if err != nil {
			t.Fatal(err)
		}
		if !errors.Is(res[0].Err, unix.ENODEV) || res[1].Err != nil || res[2].Err != nil {
			t.Fatalf("verdicts %v, %v, %v: a refused message must not stop the rest", res[0].Err, res[1].Err, res[2].Err)
		}
		if len(res[2].Replies) != 1 || string(Parse(res[2].Replies[0][unix.SizeofIfInfomsg:])[unix.IFLA_IFNAME]) != "lo\x00" {
			t.Errorf("lo: %q", res[2].Replies)
		}
		if binary.NativeEndian.Uint32(res[2].Replies[0][8:])&unix.IFF_UP == 0 {
			t.Error("lo is not up")
		}
	}
	err = c.Do(Message{Type: unix.RTM_SETLINK, Data: link(1, true)}, Message{Type: unix.RTM_DELLINK, Data: link(1, false)})
	if err == nil || !strings.Contains(err.Error(), "message 2 of 2") {
		t.Errorf("deleting lo: %v", err)
	}
	all, err := c.Dump(Message{Type: unix.RTM_GETLINK, Data: link(0, false)})
	if err != nil || len(all) == 0 {
		t.Errorf("dump: %d links, %v", len(all), err)
	}
}

// TestTransaction checks that a refused message takes its neighbours back.
func TestTransaction(t *testing.T) {
	c, err := DialIn(unix.NETLINK_NETFILTER, newNetNS(t))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	table := func(typ int, flags uint16, name string) Message {
		return Message{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | uint16(typ), Flags: flags, Data: Attrs{unix.NFPROTO_IPV4, 0, 0, 0}.String(unix.NFTA_TABLE_NAME, name)}
	}
	err = c.Transaction(unix.NFNL_SUBSYS_NFTABLES, table(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, "one"), table(unix.NFT_MSG_DELTABLE, 0, "none"), table(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, "two"))
	if !errors.Is(err, unix.ENOENT) {
		t.Errorf("error %v, want ENOENT", err)
	}
	if all, err := c.Dump(table(unix.NFT_MSG_GETTABLE, 0, "")); err != nil || len(all) != 0 {
		t.Errorf("%d tables after a refused transaction, %v", len(all), err)
	}
	if err := c.Transaction(unix.NFNL_SUBSYS_NFTABLES, table(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, "one"), table(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, "two")); err != nil {
		t.Fatal(err)
	}
	if all, err := c.Dump(table(unix.NFT_MSG_GETTABLE, 0, "")); err != nil || len(all) != 2 {
		t.Errorf("%d tables, want 2, %v", len(all), err)
	}
}

func TestIn(t *testing.T) {
	ns := newNetNS(t)
	name := func() string {
		s, err := os.Readlink("/proc/thread-self/ns/net")
		if err != nil {
			t.Error(err)
		}
		return s
	}
	home, inside := name(), ""
	want := errors.New("mine")
	if err := In(ns, func() error { inside = name(); return want }); err != want {
		t.Errorf("error %v", err)
	}
	if inside == home || name() != home {
		t.Errorf("home %s, inside %s, afterwards %s", home, inside, name())
	}
	if err := In(os.Stdin, func() error { return nil }); err == nil {
		t.Error("entered something that is no namespace")
	}
}

func FuzzEach(f *testing.F) {
	f.Add([]byte(Attrs{}.String(1, "a").Nest(2, Attrs{}.Uint32(3, 4))))
	f.Add([]byte{4, 0, 1, 0, 3, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		var again Attrs
		n := 0
		Each(b, func(typ uint16, data []byte) {
			n++
			again = again.Bytes(typ, data)
		})
		Each(again, func(uint16, []byte) { n-- })
		if n != 0 || len(again) > len(b)+3 {
			t.Errorf("%d attributes were lost", n)
		}
		if !bytes.Equal(again, []byte(pad(append([]byte(nil), again...)))) {
			t.Error("not padded")
		}
	})
}

func TestKept(t *testing.T) {
	var k Kept
	dial := func() *Conn {
		t.Helper()
		c, err := k.Dial(unix.NETLINK_ROUTE)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	a := dial()
	b := dial() // a is in use
	if a == b {
		t.Fatal("two users have one socket")
	}
	if err := errors.Join(a.Close(), b.Close()); err != nil { // the second one is really closed
		t.Fatal(err)
	}
	if _, err := unix.GetsockoptInt(b.fd, unix.SOL_SOCKET, unix.SO_TYPE); err != unix.EBADF {
		t.Errorf("the socket that is not kept: %v", err)
	}
	c := dial()
	defer unix.Close(c.fd)
	if c != a {
		t.Error("the kept socket is not used again")
	}
	c.CloseBehind()
	if c != dial() {
		t.Error("CloseBehind does not keep the socket")
	}
	if _, err := c.Execute(Message{Type: unix.RTM_GETLINK, Data: link(1, false)}); err != nil {
		t.Errorf("the kept socket: %v", err)
	}
}
