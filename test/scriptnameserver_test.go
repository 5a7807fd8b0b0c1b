package test

import (
	wire "encoding/binary"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/net/dns/dnsmessage"

	"conex/internal/linux/netlink"
)

// scriptNameserver starts a name server of the script's host. It knows the names that are given, and writes what it is asked into a file.
func (w *world) scriptNameserver(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: nameserver FILE ADDRESS [NAME=ADDRESS]...")
	}
	log, err := os.Create(ts.MkAbs(args[0]))
	ts.Check(err)
	known := map[string]netip.Addr{}
	for _, a := range args[2:] {
		name, addr, _ := strings.Cut(a, "=")
		known[name+"."], err = netip.ParseAddr(addr)
		ts.Check(err)
	}
	var udp net.PacketConn
	var tcp net.Listener
	ts.Check(netlink.In(w.netns, func() error {
		if udp, err = net.ListenPacket("udp", args[1]+":53"); err != nil {
			return err
		}
		tcp, err = net.Listen("tcp", args[1]+":53")
		return err
	}))
	var wg sync.WaitGroup
	ts.Defer(func() {
		udp.Close()
		tcp.Close()
		wg.Wait()
		log.Close()
	})
	var mu sync.Mutex
	answer := func(q []byte) []byte {
		mu.Lock()
		defer mu.Unlock()
		var p dnsmessage.Parser
		h, err := p.Start(q)
		if err != nil {
			return nil
		}
		question, err := p.Question()
		if err != nil {
			return nil
		}
		name := question.Name.String()
		if _, err := log.WriteString(name + "\n"); err != nil {
			return nil
		}
		addr, ok := known[name]
		h = dnsmessage.Header{ID: h.ID, Response: true, RecursionDesired: h.RecursionDesired, RecursionAvailable: true}
		if !ok {
			h.RCode = dnsmessage.RCodeNameError
		}
		m := dnsmessage.Message{Header: h, Questions: []dnsmessage.Question{question}}
		rh := dnsmessage.ResourceHeader{Name: question.Name, Class: dnsmessage.ClassINET, TTL: 60}
		switch {
		case ok && question.Type == dnsmessage.TypeA && addr.Is4():
			m.Answers = []dnsmessage.Resource{{Header: rh, Body: &dnsmessage.AResource{A: addr.As4()}}}
		case ok && question.Type == dnsmessage.TypeAAAA && addr.Is6():
			m.Answers = []dnsmessage.Resource{{Header: rh, Body: &dnsmessage.AAAAResource{AAAA: addr.As16()}}}
		}
		b, err := m.Pack()
		if err != nil {
			return nil
		}
		return b
	}
	wg.Add(2)
	go func() {
		defer wg.Done()
		b := make([]byte, 4096)
		for {
			n, from, err := udp.ReadFrom(b)
			if err != nil {
				return
			}
			if a := answer(b[:n]); a != nil {
				_, _ = udp.WriteTo(a, from) // who asked may have gone
			}
		}
	}()
	go func() {
		defer wg.Done()
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			var size [2]byte
			if _, err := io.ReadFull(c, size[:]); err == nil {
				q := make([]byte, wire.BigEndian.Uint16(size[:]))
				if _, err := io.ReadFull(c, q); err == nil {
					a := answer(q)
					_, _ = c.Write(append(wire.BigEndian.AppendUint16(nil, uint16(len(a))), a...))
				}
			}
			c.Close()
		}
	}()
}
