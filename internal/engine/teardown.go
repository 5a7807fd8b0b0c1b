package engine

import (
	"context"
	"errors"

	"conex/internal/linux/cgroup"
	"conex/internal/network"
)

// Teardown takes down what conex keeps in the kernel between containers: the bridge, the nftables table, forwarding where
// conex switched it on, the mounts of images and layers and the empty parent of the cgroups. Data and configuration stay, and the next
// command that needs something sets it up again. It refuses while a container runs (ErrConflict).
func (e *Engine) Teardown(ctx context.Context) error {
	if err := e.Settle(ctx); err != nil {
		return err
	}
	running, err := e.ListContainers(ctx, ListRequest{})
	if err != nil {
		return err
	}
	if len(running) > 0 {
		return conflict("%d running container(s): stop them first", len(running))
	}
	err = e.Networks().Cleanup(ctx)
	if errors.Is(err, network.ErrInUse) {
		return conflict("a build or another container still uses the network: wait for it to end")
	}
	_, merr := e.UnmountAllImages(ctx, true)
	ls, lerr := e.Layers()
	if lerr == nil {
		lerr = ls.Unmount()
	}
	return errors.Join(err, merr, lerr, e.Volumes().Settle(), cgroup.Prune(monitorsCgroup), cgroup.Prune("conex"))
}
