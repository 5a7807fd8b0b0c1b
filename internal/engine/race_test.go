package engine

import (
	"context"
	"errors"
	"os"
	"testing"

	"conex/internal/container"
	"conex/internal/disk"
)

// TestStartOfARemovedContainer is a start that loses the race against rm: it found the container, and then it is gone.
func TestStartOfARemovedContainer(t *testing.T) {
	e := newImageEngine(t)
	rec := &container.Record{ID: disk.RandomID(), Name: "gone"}
	if _, err := e.launch(context.Background(), rec, nil, startMonitor(), attachment{}, &Streams{}); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v", err)
	}
	if _, err := os.Lstat(e.Containers().RunDir(rec.ID)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the run folder is left: %v", err)
	}
}

// TestSettleOfARemovedContainer settles what a dead monitor left of a container that somebody has removed.
func TestSettleOfARemovedContainer(t *testing.T) {
	e := newImageEngine(t)
	id := disk.RandomID()
	cs := e.Containers()
	l, err := cs.Lock(id)
	if err != nil {
		t.Fatal(err)
	}
	l.Release()
	if err := cs.SetState(id, &container.State{Status: container.Running, BootID: disk.BootID(), AutoRemove: true}); err != nil {
		t.Fatal(err)
	}
	if err := e.Settle(context.Background()); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(cs.RunDir(id)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the run folder is left: %v", err)
	}
}

// TestSettleRemovesWhatAKilledRmLeft finds a run folder without a state, whose container is gone.
func TestSettleRemovesWhatAKilledRmLeft(t *testing.T) {
	e := newImageEngine(t)
	id := disk.RandomID()
	l, err := e.Containers().Lock(id)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Settle(context.Background()); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(e.Containers().RunDir(id)); err != nil {
		t.Errorf("the run folder was removed under a lock: %v", err)
	}
	l.Release()
	if err := e.Settle(context.Background()); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(e.Containers().RunDir(id)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the run folder is left: %v", err)
	}
}
