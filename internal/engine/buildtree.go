package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"conex/internal/build"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/safepath"
	"conex/internal/volume"

	"golang.org/x/sys/unix"
)

// tree shows the file system of what was built, or the part of it that the output asks for.
func (o *buildOutput) tree(ctx context.Context, img image.Image, source string) (*os.File, error) {
	root, err := o.e.imageTree(ctx, img)
	if err != nil {
		return nil, err
	}
	defer root.Close() // what is open below keeps the mount
	f, err := safepath.Open(root, source, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("src=%s: there is no such folder in the result", source)
	}
	return f, err
}

// folder copies the result into a folder.
func (o *buildOutput) folder(ctx context.Context, x *build.Export, out *BuildOutput) error {
	return x.Step("exporting to client directory", func(func(current, total int64)) (string, error) {
		tree, err := o.tree(ctx, imageOf(x), out.Source)
		if err != nil {
			return "", err
		}
		defer tree.Close()
		if err := os.MkdirAll(out.Dest, 0o755); err != nil {
			return "", err
		}
		if err := volume.MergeTree(ctx, out.Dest, tree, volume.MergeOptions{Time: x.Epoch, Mirror: out.Mirror}); err != nil {
			return "", fmt.Errorf("write %s: %w", out.Dest, err)
		}
		return out.Dest, nil
	})
}

// tarball writes the result as a tar.
func (o *buildOutput) tarball(ctx context.Context, x *build.Export, out *BuildOutput) error {
	return x.Step("exporting to client tarball", func(progress func(current, total int64)) (string, error) {
		tree, err := o.tree(ctx, imageOf(x), out.Source)
		if err != nil {
			return "", err
		}
		defer tree.Close()
		return "", o.write(out, progress, func(w io.Writer) error {
			return layers.WriteTreeAt(ctx, w, tree, x.Epoch, nil)
		})
	})
}

// write gives fn what an output's file is written to.
func (o *buildOutput) write(out *BuildOutput, progress func(current, total int64), fn func(io.Writer) error) error {
	return o.file(out.Dest, func(w io.Writer) error {
		return fn(&writeCounter{w: w, tell: func(n int64) { progress(n, 0) }})
	})
}

// writeCounter tells how many bytes were written, now and then.
type writeCounter struct {
	w       io.Writer
	n, told int64
	tell    func(n int64)
}

func (c *writeCounter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	if c.n += int64(n); c.n-c.told >= 4<<20 {
		c.told = c.n
		c.tell(c.n)
	}
	return n, err
}

// imageOf is what was built as an image that may not be in the store.
func imageOf(x *build.Export) image.Image {
	img := image.Image{ID: x.ID(), Config: x.Image, RawConfig: x.Config}
	if x.Image.Created != nil {
		img.Created = *x.Image.Created
	}
	return img
}
