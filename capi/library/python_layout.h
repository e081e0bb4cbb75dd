/* {minor, PyPreConfig: size, utf8_mode, PyConfig: size, isolated, use_environment, install_signal_handlers, site_import,
 *  program_name, home, executable}: the rows that scripts/pyconfig-offsets prints. */
{10, 40, 28, 392, 4, 8, 16, 152, 240, 256, 296},
{11, 40, 28, 424, 4, 8, 16, 168, 264, 280, 328},
{12, 40, 28, 432, 4, 8, 16, 176, 272, 288, 336},
{13, 40, 28, 448, 4, 8, 16, 176, 280, 296, 344},
