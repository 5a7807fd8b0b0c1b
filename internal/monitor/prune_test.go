package monitor_test

import (
	"fmt"
	"sync"
	"testing"

	"conex/internal/engine"
)

// TestPruneAfterRun: whoever has heard of a run's end can have its volumes.
func TestPruneAfterRun(t *testing.T) {
	w := newWorld(t)
	for i := range 50 {
		r := request("true")
		r.HostConfig.AutoRemove = true
		r.HostConfig.Binds = []string{"named:/named"}
		if _, errs, code, err := w.run(r); err != nil || code != 0 {
			t.Fatalf("%q %d %v", errs, code, err)
		}
		rep, err := w.Prune(t.Context(), engine.PruneRequest{Volumes: true, AllVolumes: true})
		if err != nil || len(rep.Volumes) != 1 {
			t.Fatalf("after run %d: volumes %v pruned, %v", i, rep.Volumes, err)
		}
	}
}

// TestPruneBesideRuns prunes everything all the time while containers with volumes are made and run: no run may notice.
func TestPruneBesideRuns(t *testing.T) {
	w := newWorld(t)
	keep := request("true")
	if _, err := w.Create(t.Context(), keep.CreateRequest); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var pruner, users sync.WaitGroup
	pruned := 0
	pruner.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			// Not the one that keeps the image.
			rep, err := w.Prune(t.Context(), engine.PruneRequest{
				Containers: true, Volumes: true, Images: true, BuildCache: true, AllImages: true, AllCache: true, AllVolumes: true,
				Filters: map[string][]string{"label": {"prune"}},
			})
			if err == nil {
				_, err = w.Prune(t.Context(), engine.PruneRequest{Volumes: true, AllVolumes: true})
			}
			if err != nil {
				t.Error(err)
				return
			}
			pruned += len(rep.Containers)
		}
	})
	for n := range 3 {
		users.Go(func() {
			for i := range 10 {
				r := request("sh", "-c", "cat /data/sub/file && echo x >/named/f")
				r.Config.Labels = map[string]string{"prune": ""}
				r.Config.Volumes = map[string]struct{}{"/data": {}}
				r.HostConfig.Binds = []string{fmt.Sprintf("named%d-%d:/named", n, i)}
				if out, errs, code, err := w.run(r); err != nil || code != 0 || out != "from the image\n" {
					t.Errorf("%q %q %d %v", out, errs, code, err)
				}
			}
		})
	}
	users.Wait()
	close(stop)
	pruner.Wait()
	rep, err := w.Prune(t.Context(), engine.PruneRequest{Containers: true, Filters: map[string][]string{"label": {"prune"}}})
	if err != nil || pruned+len(rep.Containers) != 30 {
		t.Errorf("%d and %d containers pruned, %v", pruned, len(rep.Containers), err)
	}
	if _, err := w.Prune(t.Context(), engine.PruneRequest{Volumes: true, AllVolumes: true}); err != nil {
		t.Error(err)
	}
}
