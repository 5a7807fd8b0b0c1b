package portmap

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// serveTCP accepts on l until it is closed and joins each connection to a port of the container.
func (r *Reservation) serveTCP(ctx context.Context, l *net.TCPListener, port uint16) {
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			// Out of descriptors, or a connection that went away: accepting again at once would spin.
			select {
			case <-ctx.Done():
				return
			case <-time.After(10 * time.Millisecond):
				continue
			}
		}
		if !r.track(c) {
			c.Close()
			return
		}
		r.done.Go(func() {
			defer r.untrack(c)
			defer c.Close()
			r.joinTCP(ctx, c, port)
		})
	}
}

// joinTCP copies both ways until both are at their end. Between two TCP sockets io.Copy splices in the kernel: no buffer here.
func (r *Reservation) joinTCP(ctx context.Context, client *net.TCPConn, port uint16) {
	server := r.dial(ctx, port)
	if server == nil {
		// Nobody listens in the container: a reset, as a closed port would give, instead of an orderly end.
		client.SetLinger(0)
		return
	}
	defer server.Close()
	defer r.untrack(server)
	var wg sync.WaitGroup
	wg.Go(func() { copyHalf(server, client) })
	copyHalf(client, server)
	wg.Wait()
}

// dial connects to the container where it is when the connection stands; nil when it can't.
func (r *Reservation) dial(ctx context.Context, port uint16) *net.TCPConn {
	d := net.Dialer{KeepAlive: -1}
	d.SetMultipathTCP(false)
	for {
		to := r.to(port)
		c, err := d.DialContext(ctx, "tcp", to.String())
		if err == nil {
			if r.leads(c, to.Addr()) {
				return c.(*net.TCPConn)
			}
			c.Close()
		}
		if r.to(port) == to || r.over() {
			return nil
		}
	}
}

// copyHalf copies one direction and passes its end on, so that a half-closed connection stays half open.
func copyHalf(dst, src *net.TCPConn) {
	if _, err := io.Copy(dst, src); err != nil {
		// One side is broken: there is no end to pass on, both must go.
		dst.SetLinger(0)
		dst.Close()
		src.Close()
		return
	}
	dst.CloseWrite()
}
