package build

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"conex/internal/dockerfile"
	"conex/internal/git"
)

// clone is one git repository of an ADD. Its key is the commit.
type clone struct {
	b      *Builder
	client *git.Client
	src    git.Source
	commit git.Commit
}

// gitSource takes a source of an ADD that is a git repository; ok is false for another. COPY takes none.
func (c *copier) gitSource(p *planner, in *dockerfile.Copy, source string) (ok bool, err error) {
	src, isGit, err := git.Parse(source)
	if !isGit || src.Short { // that is a folder of the context
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if !in.Add {
		return false, errors.New("source can't be a git ref for COPY")
	}
	if in.KeepGit != nil && src.KeepDir != nil && *in.KeepGit != *src.KeepDir {
		return false, errors.New("inconsistent keep-git-dir configuration")
	}
	if src.KeepDir == nil {
		src.KeepDir = in.KeepGit
	}
	if in.Checksum != "" && src.Checksum != "" && in.Checksum != src.Checksum {
		return false, fmt.Errorf("checksum mismatch %q != %q", in.Checksum, src.Checksum)
	}
	if in.Checksum != "" {
		if strings.Trim(in.Checksum, "0123456789abcdefABCDEF") != "" {
			return false, fmt.Errorf("invalid checksum %s for Git URL, expected hex commit hash", in.Checksum)
		}
		src.Checksum = in.Checksum
	}
	c.gits = append(c.gits, &clone{b: p.b, client: gitClient(p.req), src: src})
	return true, nil
}

// key asks the remote for the commit.
func (g *clone) key(ctx context.Context) (string, error) {
	var err error
	if g.commit, err = g.client.Resolve(ctx, g.src); err != nil {
		return "", fmt.Errorf("ADD: %w", err)
	}
	return strings.Join(append(gitKey(g.src, g.commit), g.src.Subdir), " "), nil
}

// copyTo adds the files to the layer.
func (g *clone) copyTo(ctx context.Context, c *copier, several bool) (err error) {
	v, closer, err := g.b.gitView(ctx, g.client, g.src, g.commit)
	if err != nil {
		return fmt.Errorf("ADD: %w", err)
	}
	defer func() { err = errors.Join(err, closer()) }()
	sel, err := v.selection(ctx, []string{"/"}, selectOptions{exclude: c.op.Exclude})
	if err != nil {
		return err
	}
	for i := range sel {
		if err := c.source(ctx, v, &sel[i], several); err != nil {
			return err
		}
	}
	return nil
}
