package collect

import (
	"context"
	"fmt"

	"conex/internal/disk"
	"conex/internal/ocispec"
)

// Exclusive runs fn while nobody can make or extend a lease, and tells it what the live ones name. Whoever takes a lease on something and
// then looks whether it is there, looks either before fn (and is among held) or after it.
func Exclusive(ctx context.Context, root *disk.Root, fn func(held map[ocispec.Digest]bool) error) error {
	gc, err := disk.AcquireContext(ctx, gcLock(root))
	if err != nil {
		return fmt.Errorf("lock leases: %w", err)
	}
	defer gc.Release()
	held, _, err := leases(root, true)
	if err != nil {
		return err
	}
	return fn(held)
}
