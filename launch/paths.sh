# shellcheck shell=bash
# Read by the scripts that take paths from variables; whoever reads it has a `die`.

# expand_paths NAME...: puts the home folder in the place of ~ or ~user at the start of these variables: in quotes, or in a
# file of settings, no shell has done it. A variable that is empty or not set stays as it is.
expand_paths() {
    local name value user home
    for name in "$@"; do
        value="${!name:-}"
        [[ "$value" == "~"* ]] || continue
        user="${value%%/*}"
        home="$user"
        [[ ! "$user" =~ ^~([A-Za-z_][A-Za-z0-9._-]*)?$ ]] || eval "home=$user"
        [ "$home" != "$user" ] || die "$name=$value: there is no home folder of '$user'; write the path out, or ./$value"
        printf -v "$name" '%s' "$home${value#"$user"}"
    done
}
