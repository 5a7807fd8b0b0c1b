package cli

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	apii "github.com/moby/moby/api/types/image"
	"github.com/spf13/cobra"

	"conex/internal/engine"
)

func (a *app) imagesCommand() *cobra.Command {
	var req engine.ImagesRequest
	var quiet, noTrunc, digests bool
	var format string
	var filters filterFlag
	cmd := &cobra.Command{
		Use: "images [OPTIONS] [REPOSITORY[:TAG]]", Short: "List images", Args: a.between(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			req.Filters = filters.m
			if len(args) > 0 {
				req.Reference = args[0]
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			sums, damaged := e.ListImages(cmd.Context(), req)
			if sums == nil {
				return damaged
			}
			def := `{{.Repository}}\t{{.Tag}}\t{{.ID}}\t{{if .CreatedSince}}{{.CreatedSince}}{{else}}N/A{{end}}\t{{.Size}}`
			if digests {
				def = strings.Replace(def, `\t{{.ID}}`, `\t{{.Digest}}\t{{.ID}}`, 1)
			}
			if quiet && (format == "" || format == "table" || strings.HasPrefix(format, "table ")) {
				format = "{{.ID}}"
			}
			// One damaged image does not hide the others, nor do they hide it.
			err = writeList(a.out, format, def, imageHeadings(), imageRows(sums, !noTrunc, digests || strings.Contains(format, ".Digest"), time.Now()))
			return errors.Join(err, damaged)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&req.All, "all", "a", false, "Show all images (default hides intermediate images)")
	f.BoolVar(&digests, "digests", false, "Show digests")
	f.VarP(&filters, "filter", "f", "Filter output based on conditions provided")
	f.StringVar(&format, "format", "", formatHelp)
	f.BoolVar(&noTrunc, "no-trunc", false, "Don't truncate output")
	f.BoolVarP(&quiet, "quiet", "q", false, "Only show image IDs")
	refuseAll(f, "tree?")
	return cmd
}

func imageHeadings() headings {
	return headings{"ID": "IMAGE ID", "Repository": "REPOSITORY", "Tag": "TAG", "Digest": "DIGEST", "CreatedSince": "CREATED", "CreatedAt": "CREATED AT",
		"Size": "SIZE", "Containers": "CONTAINERS", "VirtualSize": "SIZE", "SharedSize": "SHARED SIZE", "UniqueSize": "UNIQUE SIZE"}
}

// imageRow is a line of images; its fields, in the order of their JSON form, are what templates may name.
type imageRow struct {
	Containers, CreatedAt, CreatedSince, Digest, ID, Repository, SharedSize, Size, Tag, UniqueSize, VirtualSize string
}

const none = "<none>"

// imageRows makes a line of every name of an image; with digests one of every pair of tag and digest.
func imageRows(sums []apii.Summary, trunc, digests bool, now time.Time) []imageRow {
	var rows []imageRow
	for i := range sums {
		s := &sums[i]
		id := s.ID
		if trunc {
			id = short(id)
		}
		base := imageRow{
			ID: id, Repository: none, Tag: none, Digest: none, Size: units.HumanSizeWithPrecision(float64(s.Size), 3),
			VirtualSize: units.HumanSizeWithPrecision(float64(s.Size), 4),
			Containers:  countOrNA(s.Containers), SharedSize: sizeOrNA(s.SharedSize), UniqueSize: "N/A",
		}
		if s.SharedSize >= 0 {
			base.UniqueSize = sizeOrNA(s.Size - s.SharedSize)
		}
		if s.Created > 0 {
			created := time.Unix(s.Created, 0)
			base.CreatedAt = created.String()
			base.CreatedSince = units.HumanDuration(max(0, now.Sub(created))) + " ago"
		}
		digestsOf := map[string][]string{}
		var repos []string // in order of appearance, those with digests only
		for _, d := range s.RepoDigests {
			repo, digest, ok := strings.Cut(d, "@")
			if ok && repo != none {
				if digestsOf[repo] == nil {
					repos = append(repos, repo)
				}
				digestsOf[repo] = append(digestsOf[repo], digest)
			}
		}
		tagged := map[string]bool{}
		before := len(rows)
		for _, t := range s.RepoTags {
			i := strings.LastIndexByte(t, ':')
			if i < 0 || t == none+":"+none {
				continue
			}
			r := base
			r.Repository, r.Tag = t[:i], t[i+1:]
			tagged[r.Repository] = true
			if ds := digestsOf[r.Repository]; len(ds) > 0 {
				for _, d := range ds {
					r.Digest = d
					rows = append(rows, r)
					if !digests {
						break
					}
				}
				continue
			}
			rows = append(rows, r)
		}
		for _, repo := range repos {
			if tagged[repo] {
				continue
			}
			for _, d := range digestsOf[repo] {
				r := base
				r.Repository, r.Digest = repo, d
				rows = append(rows, r)
			}
		}
		if len(rows) == before {
			rows = append(rows, base)
		}
	}
	return rows
}

func countOrNA(n int64) string {
	if n < 0 {
		return "N/A"
	}
	return strconv.FormatInt(n, 10)
}

func sizeOrNA(n int64) string {
	if n < 0 {
		return "N/A"
	}
	return units.HumanSizeWithPrecision(float64(n), 3)
}

func (a *app) tagCommand() *cobra.Command {
	return &cobra.Command{
		Use: "tag SOURCE_IMAGE[:TAG] TARGET_IMAGE[:TAG]", Short: "Create a tag TARGET_IMAGE that refers to SOURCE_IMAGE", Args: a.exactly(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			return e.Tag(cmd.Context(), args[0], args[1])
		},
	}
}

func (a *app) rmiCommand() *cobra.Command {
	var req engine.RemoveImageRequest
	cmd := &cobra.Command{
		Use: "rmi [OPTIONS] IMAGE [IMAGE...]", Short: "Remove one or more images", Args: a.atLeast(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := a.engine()
			if err != nil {
				return err
			}
			var errs []error
			for _, name := range args {
				done, err := e.RemoveImage(cmd.Context(), name, req)
				for _, d := range done {
					if d.Untagged != "" {
						fmt.Fprintf(a.out, "Untagged: %s\n", d.Untagged)
					}
					if d.Deleted != "" {
						fmt.Fprintf(a.out, "Deleted: %s\n", d.Deleted)
					}
				}
				if err != nil {
					errs = append(errs, err)
				}
			}
			return a.forgiveMissing(req.Force, errs)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&req.Force, "force", "f", false, "Force removal of the image")
	f.BoolVar(&req.NoPrune, "no-prune", false, "Do not delete untagged parents")
	refuseAll(f, "platform")
	return cmd
}
