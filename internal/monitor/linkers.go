package monitor

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"conex/internal/container"
	"conex/internal/control"
)

// A container that is linked to may start again with another address. It finds who knows it by their marks, empty files in its own run
// folder that they make at their start, and asks their monitors, who alone write their hosts files.
const linkersDir = "linkers"

// relinkTimeout bounds how long a container's start waits for who has a link to it; a monitor is busy while its own container starts.
const relinkTimeout = 2 * time.Second

// markLinks makes the marks at the containers that this one has links to, before it looks for their addresses: who starts after that sees the mark.
func (m *monitor) markLinks() error {
	for _, l := range m.rec.Options.Links {
		dir := m.store.RunDir(l.ID, linkersDir)
		err := os.Mkdir(dir, 0o700)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it never ran, which the look for its address says
		}
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, m.rec.ID), nil, 0o600); err != nil && !errors.Is(err, fs.ErrNotExist) { // removed just now
			return err
		}
	}
	return nil
}

// unmarkLinks takes the marks away. One that is left costs a start of the other container a look.
func (m *monitor) unmarkLinks() {
	for _, l := range m.rec.Options.Links {
		os.Remove(m.store.RunDir(l.ID, linkersDir, m.rec.ID))
	}
}

// tellLinkers has those with a link to this container look for its address. The container runs whether they do or not.
func (m *monitor) tellLinkers() {
	dir := m.store.RunDir(m.rec.ID, linkersDir)
	marks, err := os.ReadDir(dir)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			complain("look for links", err)
		}
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), relinkTimeout)
	defer cancel()
	for _, k := range marks {
		err := control.NewClient(m.store.RunDir(k.Name(), "sock")).Relink(ctx)
		if !errors.Is(err, control.ErrGone) {
			if err != nil {
				complain("update a link of "+k.Name(), err)
			}
			continue
		}
		if _, err := m.store.Load(k.Name()); errors.Is(err, container.ErrNotFound) {
			os.Remove(filepath.Join(dir, k.Name()))
		}
	}
}

// relink looks again where the linked containers are. One that does not run keeps its last address.
func (s *server) relink(w http.ResponseWriter) error {
	m := s.m
	m.changes.Lock()
	defer m.changes.Unlock()
	if r := m.present(); r != nil && !r.released {
		if err := r.relink(); err != nil {
			return err
		}
	}
	return answer(w, struct{}{})
}

// relink does the work; the caller holds m.changes.
func (r *run) relink() error {
	for i, l := range r.m.rec.Options.Links {
		now, err := r.m.link(l)
		if err != nil || i >= len(r.links) {
			continue
		}
		old := r.links[i]
		if now.ip == old.ip {
			continue
		}
		r.links[i] = now
		if err := replaceLine(filepath.Join(r.files, "hosts"), old.hosts(), now.hosts()); err != nil {
			return err
		}
	}
	return nil
}

// maxHosts is how large a hosts file may be that is changed: the container may have written anything into it.
const maxHosts = 1 << 20

// replaceLine replaces a line of a mounted file, in place. What the container has written beside it stays; it may have removed the line.
func replaceLine(path, old, now string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxHosts+1))
	f.Close()
	if err != nil || len(b) > maxHosts || !bytes.Contains(b, []byte(old)) {
		return err
	}
	return writeInPlace(path, bytes.Replace(b, []byte(old), []byte(now), 1))
}
