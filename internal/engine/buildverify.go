package engine

import (
	"context"
	"strings"

	"conex/internal/build"
)

// verify builds again, without cache and without leaving anything, and compares. The error is a *build.Difference if there is one.
func (o *buildOutput) verify(ctx context.Context, x *build.Export, rewritten *build.Export) error {
	return x.Step("building again without cache, to compare", func(func(current, total int64)) (string, error) {
		first := x
		if rewritten != nil {
			first = rewritten
		}
		var second *build.Export
		req := o.req.Request
		req.NoCache, req.Pull, req.Discard, req.Display, req.CacheFrom = true, false, true, nil, nil
		req.Export = func(ctx context.Context, y *build.Export) (err error) {
			if second = y; rewritten != nil {
				second, err = y.Rewritten(ctx)
			}
			return err
		}
		if _, err := o.builder.Build(ctx, req); err != nil {
			return "", err
		}
		d, err := first.Compare(ctx, second)
		if err != nil {
			return "", err
		}
		if d != nil {
			return "", d
		}
		return "the second build is the same: " + strings.TrimPrefix(string(first.ID()), "sha256:"), nil
	})
}
