package network

import (
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"conex/internal/linux/netlink"
	"conex/internal/portmap"
)

// BenchmarkPublished measures the ways of a published port beside two containers of one bridge: a new connection, a round trip of one
// byte, and how much passes. The client is in a namespace of its own behind the host's uplink. Decision 44 has the table.
func BenchmarkPublished(b *testing.B) {
	w := newWorld(b)
	for _, way := range []string{"bridge", "docker", "host", "forwarder"} {
		check(b, w.m.SetPolicy(b.Context(), way == "docker"))
		srv := w.attach("srv" + way)
		serveBench(b, srv.ns)
		from, addr := w.client, hostIP4+":8080"
		var r *portmap.Reservation
		switch way {
		case "bridge":
			from, addr = w.attach("cli").ns, srv.ep.Address.Addr().String()+":80"
		case "forwarder": // the listeners alone: what the policy host costs on a kernel without packet log
			r = srv.publish(portmap.Mapping{Proto: "tcp", HostPort: 8080, ContainerPort: 80})
			check(b, portmap.Withdraw(b.Context(), must(w.m.table(b.Context())), r.Mappings()))
		default:
			r = srv.publish(portmap.Mapping{Proto: "tcp", HostPort: 8080, ContainerPort: 80})
		}
		b.Run(way+"/connect", func(b *testing.B) {
			in(b, from, func() error {
				times := make([]time.Duration, 0, b.N)
				for b.Loop() {
					t := time.Now()
					c, err := net.Dial("tcp", addr)
					if err != nil {
						return err
					}
					// The forwarder's connection stands before the container's does: only an answer proves it.
					if _, err := c.Write([]byte{'e'}); err != nil {
						return err
					}
					if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
						return err
					}
					times = append(times, time.Since(t))
					c.Close()
				}
				report(b, times)
				return nil
			})
		})
		b.Run(way+"/roundtrip", func(b *testing.B) {
			in(b, from, func() error {
				c, err := net.Dial("tcp", addr)
				if err != nil {
					return err
				}
				defer c.Close()
				times := make([]time.Duration, 0, b.N)
				buf := []byte{'e'}
				for b.Loop() {
					t := time.Now()
					if _, err := c.Write(buf); err != nil {
						return err
					}
					if _, err := io.ReadFull(c, buf); err != nil {
						return err
					}
					times = append(times, time.Since(t))
				}
				report(b, times)
				return nil
			})
		})
		b.Run(way+"/throughput", func(b *testing.B) {
			in(b, from, func() error {
				c, err := net.Dial("tcp", addr)
				if err != nil {
					return err
				}
				defer c.Close()
				if _, err := c.Write([]byte{'s'}); err != nil {
					return err
				}
				buf := make([]byte, 1<<20)
				b.SetBytes(int64(len(buf)))
				for b.Loop() {
					if _, err := c.Write(buf); err != nil {
						return err
					}
				}
				return nil
			})
		})
		if r != nil {
			check(b, r.Close())
		}
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// in runs fn in a namespace, on a goroutine that may fail.
func in(b *testing.B, ns *os.File, fn func() error) {
	b.Helper()
	check(b, netlink.In(ns, fn))
}

func report(b *testing.B, times []time.Duration) {
	slices.Sort(times)
	if n := len(times); n > 0 {
		b.ReportMetric(float64(times[n/2].Nanoseconds())/1e3, "median-µs")
		b.ReportMetric(float64(times[n*99/100].Nanoseconds())/1e3, "p99-µs")
	}
}

// serveBench answers bytes with themselves, or swallows them after an s.
func serveBench(b *testing.B, ns *os.File) {
	var l net.Listener
	check(b, netlink.In(ns, func() (err error) {
		l, err = net.Listen("tcp", fmt.Sprintf(":%d", 80))
		return err
	}))
	b.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				buf := make([]byte, 1<<20)
				for first := true; ; {
					n, err := c.Read(buf)
					if err != nil {
						return
					}
					if first && buf[0] == 's' {
						io.Copy(io.Discard, c)
						return
					}
					first = false
					if _, err := c.Write(buf[:n]); err != nil {
						return
					}
				}
			}()
		}
	}()
}
