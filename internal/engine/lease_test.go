package engine

import (
	"bytes"
	"context"
	"errors"
	"os"
	"testing"

	apic "github.com/moby/moby/api/types/container"
)

// TestCreatorDiesBeforeTheStart has clients that made containers for `run` and did not live to start them: one with --rm goes with
// its client, others stay, as in Docker.
func TestCreatorDiesBeforeTheStart(t *testing.T) {
	e, ctx := newImageEngine(t), context.Background()
	if _, err := e.Import(ctx, ImportRequest{Source: "-", Stdin: bytes.NewReader(tarOf(t, map[string]string{"a": "b"})), Reference: "base"}); err != nil {
		t.Fatal(err)
	}
	ls, err := e.Layers()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := ls.Unmount(); err != nil {
			t.Error(err)
		}
	})
	for _, c := range []struct{ rm, hold, stays bool }{{true, true, false}, {true, false, true}, {false, true, true}} {
		rec, lock, _, err := e.create(ctx, CreateRequest{
			Pull:       "never",
			Config:     &apic.Config{Image: "base", Cmd: []string{"true"}, Volumes: map[string]struct{}{"/v": {}}},
			HostConfig: &apic.HostConfig{AutoRemove: c.rm, NetworkMode: "none"},
		}, c.hold)
		if err != nil {
			t.Fatal(err)
		}
		list, err := e.ListContainers(ctx, ListRequest{All: true})
		if err != nil || len(list) != 1 || list[0].State != apic.StateCreated {
			t.Fatalf("%+v: while its creator lives: %+v %v", c, list, err)
		}
		if lock != nil {
			lock.Release() // as the kernel does when the client dies
		}
		if list, err = e.ListContainers(ctx, ListRequest{All: true}); err != nil || (len(list) == 1) != c.stays {
			t.Errorf("%+v: when its creator is dead: %+v %v", c, list, err)
		}
		if c.stays {
			if err := e.RemoveContainer(ctx, RemoveRequest{Container: rec.ID, Volumes: true}); err != nil {
				t.Error(err)
			}
		}
		if _, err := os.Lstat(e.Containers().RunDir(rec.ID)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%+v: the run folder is left: %v", c, err)
		}
		wantEmpty(t, e, "containers", "names", "volumes", "staging")
	}
	// A name that is taken leaves nothing of the second one.
	req := CreateRequest{Name: "ab", Pull: "never", Config: &apic.Config{Image: "base", Cmd: []string{"true"}}, HostConfig: &apic.HostConfig{AutoRemove: true}}
	if _, err := e.Create(ctx, req); err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := e.create(ctx, req, true); !errors.Is(classify(err), ErrConflict) {
		t.Errorf("got %v", err)
	}
	if left, err := os.ReadDir(e.Containers().RunDir("")); err != nil || len(left) != 0 {
		t.Errorf("run folders are left: %v %v", left, err)
	}
}
