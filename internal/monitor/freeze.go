package monitor

import (
	"errors"
	"io"
	"net"
	"net/http"
	"sync"

	"conex/internal/container"
	"conex/internal/control"
	"conex/internal/linux/cgroup"
)

// freezing is who wants a run's processes to stand still. Each wish lasts as long as a connection, so whoever dies lets go; that of a
// user who paused the container lasts until somebody unpauses it. The end of the run, and a signal that is meant to end it, let go for all.
type freezing struct {
	r *run
	// gate is held alone while the container is frozen, and shared while a process is put into it: a thread of ours that forks in
	// there must not be frozen along.
	gate sync.RWMutex

	mu      sync.Mutex
	holders map[*holder]bool
	user    *holder // the one of `pause`, among the holders
	over    bool
	count   int // how often it was frozen
}

// times returns how often the container was frozen until now.
func (z *freezing) times() int {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.count
}

// holder is one wish. conn is nil until the answer is out, and for a user's.
type holder struct{ conn net.Conn }

// add freezes the container if it isn't. The error is one for the client.
func (z *freezing) add(h *holder) error {
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.over {
		return &control.Error{Status: http.StatusConflict, Message: "container " + z.r.m.rec.ID + " is not running"}
	}
	if len(z.holders) == 0 {
		z.gate.Lock()
		z.count++
		err := z.r.ct.Cgroup().Freeze()
		if err == nil {
			err = z.r.m.setState(func(s *container.State) { s.Paused = true })
		}
		if err != nil {
			z.thaw()
			return err
		}
		z.r.m.event("pause", nil)
	}
	if z.holders == nil {
		z.holders = map[*holder]bool{}
	}
	z.holders[h] = true
	return nil
}

// answered gives a holder its connection; false when the container runs again by now.
func (z *freezing) answered(h *holder, conn net.Conn) bool {
	z.mu.Lock()
	defer z.mu.Unlock()
	h.conn = conn
	return z.holders[h]
}

// drop ends a wish; false when the container ran again before.
func (z *freezing) drop(h *holder) bool {
	z.mu.Lock()
	defer z.mu.Unlock()
	if !z.holders[h] {
		return false
	}
	delete(z.holders, h)
	if h == z.user {
		z.user = nil
	}
	if len(z.holders) == 0 {
		z.thaw()
		z.r.m.event("unpause", nil)
	}
	return true
}

// dropAll lets the container run, whoever wanted it to stand still; with over nobody can freeze it any more.
func (z *freezing) dropAll(over bool) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.over = z.over || over
	if len(z.holders) == 0 {
		return
	}
	for h := range z.holders {
		if h.conn != nil {
			h.conn.Close() // its reader ends
		}
	}
	z.holders, z.user = nil, nil
	z.thaw()
	z.r.m.event("unpause", nil)
}

// thaw undoes add's work on the container. Nobody could do more about an error than the kernel does: a cgroup that is killed is thawed.
func (z *freezing) thaw() {
	if err := z.r.ct.Cgroup().Thaw(); err != nil && !errors.Is(err, cgroup.ErrNotExist) {
		complain("thaw", err)
	}
	if err := z.r.m.setState(func(s *container.State) { s.Paused = false }); err != nil {
		complain("thaw", err)
	}
	z.gate.Unlock()
}

// freeze answers 101 when the container stands still, and lets it go when the client closes its half of the connection or dies.
func (s *server) freeze(w http.ResponseWriter) error {
	r, err := s.need()
	if err != nil {
		return err
	}
	h := &holder{}
	if err := r.freezing.add(h); err != nil {
		return err
	}
	conn, in, err := upgrade(w, http.Header{})
	if err != nil {
		r.freezing.drop(h)
		return err
	}
	if !r.freezing.answered(h, conn) {
		return conn.Close()
	}
	s.m.writers.Go(func() { // ends with the connection, at the latest with the run
		_, _ = io.Copy(io.Discard, in) // however it ends
		if r.freezing.drop(h) {
			_, _ = io.WriteString(conn, control.Thawed) // the client may be gone
		}
		conn.Close()
	})
	return nil
}

// paused reports whether a user has paused the container.
func (z *freezing) paused() bool {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.user != nil
}

// pause lets the container stand still until unpause.
func (s *server) pause(w http.ResponseWriter) error {
	r, err := s.need()
	if err != nil {
		return err
	}
	z, h := &r.freezing, &holder{}
	z.mu.Lock()
	taken := z.user != nil
	if !taken {
		z.user = h
	}
	z.mu.Unlock()
	if taken {
		return &control.Error{Status: http.StatusConflict, Message: "container " + s.m.rec.ID + " is already paused"}
	}
	if err := z.add(h); err != nil {
		z.mu.Lock()
		if z.user == h {
			z.user = nil
		}
		z.mu.Unlock()
		return err
	}
	return answer(w, struct{}{})
}

// unpause ends pause. What else holds the container, a commit under way, goes on to.
func (s *server) unpause(w http.ResponseWriter) error {
	r, err := s.need()
	if err != nil {
		return err
	}
	r.freezing.mu.Lock()
	h := r.freezing.user
	r.freezing.mu.Unlock()
	if h == nil || !r.freezing.drop(h) {
		return &control.Error{Status: http.StatusConflict, Message: "container " + s.m.rec.ID + " is not paused"}
	}
	return answer(w, struct{}{})
}
