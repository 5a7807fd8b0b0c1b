package test

import (
	bin "encoding/binary"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// sctpChunk types.
const sctpInit, sctpInitAck = 1, 2

// sctpPacket is an INIT or its answer, without options: what connection tracking needs to see of an association. This test makes them by hand, since
// not every kernel has SCTP sockets.
func sctpPacket(from, to uint16, chunk byte, verification, tag uint32) []byte {
	b := bin.BigEndian.AppendUint16(nil, from)
	b = bin.BigEndian.AppendUint16(b, to)
	b = bin.BigEndian.AppendUint32(b, verification)
	b = bin.BigEndian.AppendUint32(b, 0)
	b = append(b, chunk, 0, 0, 20)
	b = bin.BigEndian.AppendUint32(b, tag)
	b = bin.BigEndian.AppendUint32(b, 65536) // window
	b = bin.BigEndian.AppendUint16(b, 1)     // streams
	b = bin.BigEndian.AppendUint16(b, 1)
	b = bin.BigEndian.AppendUint32(b, tag)
	bin.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}

// sctp is a raw socket of a place.
func (p *place) sctp(h *hosts, family int) *net.IPConn {
	h.t.Helper()
	var c *net.IPConn
	h.must(p.in(func() (err error) {
		c, err = net.ListenIP([]string{"ip4:132", "ip6:132"}[family], &net.IPAddr{})
		return err
	}))
	h.t.Cleanup(func() { c.Close() })
	return c
}

// nextSCTP sends p until a packet of a chunk type and a tag comes to a port at the other end. A packet may be lost: SCTP sends it again, too.
func nextSCTP(send func() error, c *net.IPConn, chunk byte, port uint16, tag uint32, patience time.Duration) (p []byte, from netip.Addr, err error) {
	b := make([]byte, 2048)
	for deadline := time.Now().Add(patience); ; {
		if err := send(); err != nil {
			return nil, from, err
		}
		c.SetReadDeadline(time.Now().Add(patience / 10))
		for {
			n, a, err := c.ReadFromIP(b)
			if err != nil {
				if time.Now().After(deadline) {
					return nil, from, err
				}
				break
			}
			if n >= 32 && b[12] == chunk && bin.BigEndian.Uint16(b[2:]) == port && bin.BigEndian.Uint32(b[16:]) == tag {
				from, _ = netip.AddrFromSlice(a.IP)
				return b[:n], from.Unmap(), nil
			}
		}
	}
}

// TestReachSCTP sends what begins an association to a published port from everywhere, and its answer back.
func TestReachSCTP(t *testing.T) {
	w := newWorld(t)
	h := newHosts(t, w.netns)
	w.conex("pull", "-q", "busybox")
	w.conex("run", "-d", "--name", "web", "-p", fmt.Sprintf("%d:%d/sctp", publishedAll, service), "busybox", "sleep", "100000")
	w.conex("run", "-d", "--name", "mate", "busybox", "sleep", "100000")
	w.conex("network", "create", "other")
	w.conex("run", "-d", "--name", "far", "--network", "other", "busybox", "sleep", "100000")
	web, mate, far := w.container("web"), w.container("mate"), w.container("far")
	sourcePort := uint16(40000)
	for _, firewall := range []string{"", inputClosed} {
		if firewall != "" {
			if err := h.host.run(firewall, "nft", "-f", "-"); err != nil {
				t.Skip(err)
			}
			defer func() { h.must(h.host.run("", "nft", "delete", "table", "inet", "firewall")) }()
		}
		for f := range 2 {
			for _, c := range []struct {
				who  *place
				want [2]bool // without a firewall, with one that closes the port
			}{{h.outside, [2]bool{true, false}}, {h.neighbour, [2]bool{true, false}}, {h.host, [2]bool{true, true}}, {far, [2]bool{true, false}}, {mate, [2]bool{false, false}}} {
				want := c.want[strings.Count(firewall, "table")]
				server, client := web.sctp(h, f), c.who.sctp(h, f)
				sourcePort++
				tag := uint32(sourcePort)
				to := &net.IPAddr{IP: h.host.addrs[f].AsSlice()}
				what := fmt.Sprintf("firewall %t, %s to %s", firewall != "", c.who.name, to)
				patience := time.Second
				if want {
					patience = 20 * time.Second
				}
				init := func() error {
					_, err := client.WriteToIP(sctpPacket(sourcePort, publishedAll, sctpInit, 0, tag), to)
					return err
				}
				p, from, err := nextSCTP(init, server, sctpInit, service, tag, patience)
				if (err == nil) != want {
					t.Errorf("%s: %v, want it to come: %t", what, err, want)
				}
				if err != nil {
					continue
				}
				if from != c.who.addrs[f] {
					t.Errorf("%s: seen as %s, want %s", what, from, c.who.addrs[f])
				}
				ack := func() error {
					_, err := server.WriteToIP(sctpPacket(service, bin.BigEndian.Uint16(p), sctpInitAck, tag, tag+1), &net.IPAddr{IP: from.AsSlice()})
					return err
				}
				if _, from, err := nextSCTP(ack, client, sctpInitAck, sourcePort, tag+1, patience); err != nil || from != h.host.addrs[f] {
					t.Errorf("%s: the answer came from %s, %v, want %s", what, from, err, h.host.addrs[f])
				}
				server.Close()
				client.Close()
			}
		}
	}
}
