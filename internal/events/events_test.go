package events_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	mobyevents "github.com/moby/moby/api/types/events"

	"conex/internal/events"
)

func event(id string) events.Event {
	return events.Event{Type: mobyevents.ContainerEventType, Action: mobyevents.ActionStart, Actor: mobyevents.Actor{ID: id, Attributes: map[string]string{"name": "x"}}}
}

func read(t *testing.T, l *events.Log, o events.ReadOptions) []string {
	t.Helper()
	var ids []string
	if err := l.Read(t.Context(), o, func(e events.Event) error { ids = append(ids, e.Actor.ID); return nil }); err != nil {
		t.Fatal(err)
	}
	return ids
}

func TestWriteAndRead(t *testing.T) {
	dir := t.TempDir()
	l := events.Open(dir)
	if ids := read(t, l, events.ReadOptions{}); len(ids) != 0 {
		t.Errorf("no log: %v", ids)
	}
	base := time.Unix(1000, 0)
	for i := range 10 {
		e := event(fmt.Sprint(i))
		e.TimeNano = base.Add(time.Duration(i) * time.Second).UnixNano()
		if err := l.Write(e); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.OpenFile(filepath.Join(dir, "events.log"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("nonsense\n{}\n"); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := l.Write(event("last")); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(read(t, l, events.ReadOptions{}), " "); got != "0 1 2 3 4 5 6 7 8 9 last" {
		t.Errorf("all: %s", got)
	}
	o := events.ReadOptions{Since: base.Add(3 * time.Second), Until: base.Add(6 * time.Second), Filter: func(e events.Event) bool { return e.Actor.ID != "4" }}
	if got := strings.Join(read(t, l, o), " "); got != "3 5 6" {
		t.Errorf("some: %s", got)
	}
	o.Follow = true // until the past: ends at once
	if err := l.Read(t.Context(), o, func(events.Event) error { return nil }); err != nil {
		t.Errorf("follow until the past: %v", err)
	}
}

// TestFollow has several writers, rotation all the time, and a follower that must see each event once.
func TestFollow(t *testing.T) {
	const writers, each = 4, 500
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan string, writers*each)
	followed := make(chan error)
	open := func() *events.Log {
		l := events.Open(dir)
		l.MaxSize = 64 << 10
		return l
	}
	go func() {
		followed <- open().Read(ctx, events.ReadOptions{Follow: true}, func(e events.Event) error { got <- e.Actor.ID; return nil })
	}()
	// The follower keeps pace, or two rotations at once would take events away unread, as they may.
	token := make(chan struct{}, 300)
	errc := make(chan error, writers)
	for w := range writers {
		go func() {
			l := open()
			for i := range each {
				token <- struct{}{}
				if err := l.Write(event(fmt.Sprintf("%d-%d", w, i))); err != nil {
					errc <- err
					return
				}
			}
			errc <- nil
		}()
	}
	seen := map[string]bool{}
	for len(seen) < writers*each {
		id := <-got
		if seen[id] {
			t.Fatalf("%s came twice", id)
		}
		seen[id] = true
		<-token
	}
	for range writers {
		if err := <-errc; err != nil {
			t.Error(err)
		}
	}
	cancel()
	if err := <-followed; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	for _, n := range []string{"events.log", "events.log.1"} {
		st, err := os.Stat(filepath.Join(dir, n))
		if errors.Is(err, os.ErrNotExist) && n == "events.log" {
			continue // rotated just now
		}
		if err != nil || st.Size() > 65<<10 {
			t.Errorf("%s: %v, %v", n, st, err)
		}
	}
}
