package portmap

import (
	"bytes"
	"encoding/binary"
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// udp4 and udp6 are datagrams of two bytes from port 1 to 8080, without checksum.
var (
	udp4 = []byte{
		0x45, 0, 0, 30, 0, 0, 0x40, 0, 64, 17, 0, 0, 198, 51, 100, 2, 198, 51, 100, 1,
		0, 1, 0x1f, 0x90, 0, 10, 0xaa, 0xaa, 'h', 'i',
	}
	udp6 = append(append([]byte{0x60, 0, 0, 0, 0, 10, 17, 64}, append(net.ParseIP("fd00::2"), net.ParseIP("fd00::1")...)...),
		0, 1, 0x1f, 0x90, 0, 10, 0xaa, 0xaa, 'h', 'i')
)

func TestReadPacket(t *testing.T) {
	for _, b := range [][]byte{udp4, udp6} {
		k, ok := readPacket(bytes.Clone(b))
		if !ok || k.proto != unix.IPPROTO_UDP || k.dst.Port() != 8080 {
			t.Fatalf("% x: %+v %v", b, k, ok)
		}
		hops := 8
		if k.dst.Addr().Is6() {
			hops = 7
		}
		k.settle()
		if k.b[hops] != 63 {
			t.Errorf("%d hops are left", k.b[hops])
		}
		// A right checksum makes the sum over all of it, with the pseudo header, zero.
		addrs := k.b[12:20]
		if hops == 7 {
			addrs = k.b[8:40]
		}
		if s := fold(sum(k.b[k.at:], sum(addrs, uint32(unix.IPPROTO_UDP)+uint32(len(k.b)-k.at)))); s != 0 {
			t.Errorf("checksum is off by %x", s)
		}
		for n := range b {
			if _, ok := readPacket(b[:n]); ok {
				t.Errorf("%d bytes of %d are taken for a packet", n, len(b))
			}
		}
	}
	fragment := bytes.Clone(udp4)
	fragment[6] = 0x20
	if _, ok := readPacket(fragment); ok {
		t.Error("a fragment is taken for a packet")
	}
}

// TestPieces takes a large IPv6 datagram apart and puts it together again.
func TestPieces(t *testing.T) {
	data := bytes.Repeat([]byte("0123456"), 1000)
	b := append(bytes.Clone(udp6[:48]), data...)
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(data)))
	k, ok := readPacket(b)
	if !ok {
		t.Fatal("not read")
	}
	var whole []byte
	more := true
	for p := range k.pieces {
		if len(p) > 1280 || int(binary.BigEndian.Uint16(p[4:]))+40 != len(p) || p[6] != unix.IPPROTO_FRAGMENT || p[40] != unix.IPPROTO_UDP || !more {
			t.Fatalf("piece % x", p[:48])
		}
		at := binary.BigEndian.Uint16(p[42:])
		more = at&1 != 0
		if int(at&^7) != len(whole) {
			t.Fatalf("piece at %d after %d bytes", at&^7, len(whole))
		}
		whole = append(whole, p[48:]...)
	}
	if more || !bytes.Equal(whole, b[40:]) {
		t.Errorf("%d bytes of %d, more %v", len(whole), len(b)-40, more)
	}
}

// FuzzLogged feeds datagrams of the packet log whose packets any outsider chooses.
func FuzzLogged(f *testing.F) {
	for _, p := range [][]byte{udp4, udp6, nil} {
		a := netlink.Attrs{2, 0, 0, 7}.Bytes(nfulaPayload, p)
		m := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(a)))
		m = binary.NativeEndian.AppendUint16(m, unix.NFNL_SUBSYS_ULOG<<8|nfulMsgPacket)
		f.Add(append(append(m, make([]byte, 10)...), a...))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		logged(b, func(p []byte) {
			k, ok := readPacket(p)
			if !ok {
				return
			}
			k.settle()
			n := 0
			for piece := range k.pieces {
				n += len(piece)
			}
			if n < len(k.b) {
				t.Errorf("%d bytes of %d are sent", n, len(k.b))
			}
		})
	})
}

// FuzzForeign reads chains and rules that other tools made.
func FuzzForeign(f *testing.F) {
	expr := netlink.Attrs{}.String(unix.NFTA_EXPR_NAME, "immediate").Nest(unix.NFTA_EXPR_DATA, netlink.Attrs{}.
		Bytes(unix.NFTA_IMMEDIATE_DREG, []byte{0, 0, 0, 0}).
		Nest(unix.NFTA_IMMEDIATE_DATA, netlink.Attrs{}.Nest(unix.NFTA_DATA_VERDICT, netlink.Attrs{}.Bytes(unix.NFTA_VERDICT_CODE, []byte{0, 0, 0, 1}))))
	f.Add([]byte(netlink.Attrs{2, 0, 0, 0}.String(unix.NFTA_RULE_TABLE, "filter").String(unix.NFTA_RULE_CHAIN, "FORWARD").
		Nest(unix.NFTA_RULE_EXPRESSIONS, netlink.Attrs{}.Nest(unix.NFTA_LIST_ELEM, expr))))
	f.Add([]byte(netlink.Attrs{2, 0, 0, 0}.String(unix.NFTA_CHAIN_TABLE, "filter").String(unix.NFTA_CHAIN_NAME, "FORWARD").
		Nest(unix.NFTA_CHAIN_HOOK, netlink.Attrs{}.Bytes(unix.NFTA_HOOK_HOOKNUM, []byte{0, 0, 0, 2}).Bytes(unix.NFTA_HOOK_PRIORITY, []byte{0, 0, 0, 0}))))
	f.Fuzz(func(t *testing.T, b []byte) {
		readChain(b)
		r, ok := readRule(b)
		if ok && (r.table == "" || r.chain == "") {
			t.Error("a rule of no chain")
		}
		rs := &ruleset{chains: []foreignChain{{family: 2, table: "t", name: "c", typ: "filter", hooked: true, hook: unix.NF_INET_LOCAL_IN}},
			rules: map[string][]foreignRule{chainKey(2, "t", "c"): {r, r}}, sets: map[string]*foreignSet{}}
		if f := rs.ask(unix.NF_INET_LOCAL_IN, flow{family: 2, proto: 6, port: 8080, iif: "eth0", ctState: ctStateNew, local: true}); f.verdict == "" {
			t.Error("no verdict")
		}
		s := &foreignSet{}
		s.read(b)
		s.find([]byte("conex0"))
		xtMatch("tcp", b, flow{proto: 6})
		xtMatch("multiport", b, flow{proto: 6})
		xtMatch("conntrack", b, flow{proto: 6})
		xtMatch("addrtype", b, flow{local: true})
		p := passing{rules: []foreignRule{r}}
		if in, out := p.find("conex0"); len(in)+len(out) > 1 {
			t.Error("one rule is two")
		}
	})
}
