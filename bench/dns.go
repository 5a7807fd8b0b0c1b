package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"conex/internal/linux/netlink"
)

// dnsMeasurements ask the name server at 127.0.0.11 in a container of a network of its own about another container there.
func dnsMeasurements() []measurement {
	return []measurement{
		{name: "dns-answer", target: 0.1, rounds: 5, once: inAsker(dnsAnswer)},
		{name: "dns-20000", target: 2000, rounds: 5, once: inAsker(dnsMany)},
	}
}

// inAsker runs fn in the network namespace of a container on a network with another one, bench-named.
func inAsker(fn func() (float64, error)) func(*bench, *engine, int) (float64, error) {
	return func(b *bench, e *engine, i int) (v float64, err error) {
		if e.name == "podman" {
			return 0, errors.New("its name server is the network's, and a package of its own")
		}
		if err := e.do("network", "create", "bench-dns"); err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, e.do("network", "rm", "bench-dns")) }()
		defer func() { err = errors.Join(err, e.remove("bench-asker", "bench-named")) }()
		for _, name := range []string{"bench-asker", "bench-named"} {
			if err := e.do("run", "-d", "--name", name, "--network", "bench-dns", image, "sleep", "1000"); err != nil {
				return 0, err
			}
		}
		return e.inside("bench-asker", fn)
	}
}

// inside runs fn in a container's network namespace.
func (e *engine) inside(name string, fn func() (float64, error)) (v float64, err error) {
	ns, err := e.namespaceOf(name)
	if err != nil {
		return 0, err
	}
	defer ns.Close()
	err = netlink.In(ns, func() error {
		v, err = fn()
		return err
	})
	return v, err
}

// namespaceOf opens a container's network namespace.
func (e *engine) namespaceOf(name string) (*os.File, error) {
	pid, err := e.output("inspect", "-f", "{{.State.Pid}}", name)
	if err != nil {
		return nil, err
	}
	return os.Open("/proc/" + pid + "/ns/net")
}

// dnsQuery is a query for the address of bench-named.
func dnsQuery(id uint16) ([]byte, error) {
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: id, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName("bench-named."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	return m.Pack()
}

// dnsDial must be called in the container's network namespace; the socket may be used anywhere.
func dnsDial() (net.Conn, error) {
	c, err := net.Dial("udp", "127.0.0.11:53")
	if err != nil {
		return nil, err
	}
	return c, c.SetDeadline(time.Now().Add(time.Minute))
}

// dnsAnswer is the median of two thousand answers to one asker, who waits for each.
func dnsAnswer() (float64, error) {
	c, err := dnsDial()
	if err != nil {
		return 0, err
	}
	defer c.Close()
	var took []float64
	b := make([]byte, 512)
	for k := range 2000 {
		q, err := dnsQuery(uint16(k))
		if err != nil {
			return 0, err
		}
		began := time.Now()
		if _, err := c.Write(q); err != nil {
			return 0, err
		}
		n, err := c.Read(b)
		if err != nil {
			return 0, err
		}
		took = append(took, float64(time.Since(began))/1e6)
		if n < 12 || binary.BigEndian.Uint16(b) != uint16(k) || binary.BigEndian.Uint16(b[6:]) != 1 {
			return 0, fmt.Errorf("answer %x", b[:n])
		}
	}
	slices.Sort(took)
	return took[len(took)/2], nil
}

// dnsMany is the time that 20,000 answers take when four ask, each with 16 questions under way. One that is lost is an error.
func dnsMany() (float64, error) {
	const askers, each, window = 4, 5000, 16
	var conns []net.Conn
	for range askers {
		c, err := dnsDial()
		if err != nil {
			return 0, err
		}
		defer c.Close()
		conns = append(conns, c)
	}
	began := time.Now()
	errs := make(chan error, askers)
	for _, c := range conns {
		go func() {
			errs <- func() error {
				b := make([]byte, 512)
				sent, got := 0, 0
				for got < each {
					for sent < each && sent-got < window {
						q, err := dnsQuery(uint16(sent))
						if err != nil {
							return err
						}
						if _, err := c.Write(q); err != nil {
							return err
						}
						sent++
					}
					n, err := c.Read(b)
					if err != nil {
						return fmt.Errorf("after %d answers: %w", got, err)
					}
					if n < 12 || binary.BigEndian.Uint16(b[6:]) != 1 {
						return fmt.Errorf("answer %x", b[:n])
					}
					got++
				}
				return nil
			}()
		}()
	}
	var err error
	for range askers {
		err = errors.Join(err, <-errs)
	}
	return float64(time.Since(began)) / 1e6, err
}
